"""What a person sees of a run: a line an iteration, the learning curve as a picture and in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from iterative_ppo.conformance import Conformance
from iterative_ppo.intervals import Interval
from iterative_ppo.policy_iteration import IterationRecord
from iterative_ppo.q_report import QReport
from iterative_ppo.ranking import Ranking

_HEADER = f"{'iteration':>9}  {'decision':<8} {'outcome rate':>12} {'95 % interval':>15} {'candidate':>10} {'KL':>6} {'Q AUC':>6} {'seconds':>8}"


def iteration_header() -> str:
    """Column heads of `iteration_line`."""
    return _HEADER


def iteration_line(record: IterationRecord) -> str:
    """One iteration as a table row."""
    interval = f"{record.outcome.low:.3f} - {record.outcome.high:.3f}"
    candidate = "" if record.candidate is None else f"{record.candidate.mean:.3f}"
    fit = record.stages["fit"].metrics if "fit" in record.stages else {}
    discrimination = fit.get("auc", fit.get("spearman"))
    quality = "" if discrimination is None else f"{discrimination:.2f}"
    kl = "" if record.candidate is None else f"{record.kl:.2f}"
    seconds = sum(stage.seconds for stage in record.stages.values())
    return (
        f"{record.iteration:>9}  {record.decision:<8} {record.outcome.mean:>12.3f} {interval:>15} "
        f"{candidate:>10} {kl:>6} {quality:>6} {seconds:>8.0f}"
    )


def iteration_json(record: IterationRecord) -> dict[str, Any]:
    """One iteration for machines."""
    return {
        "iteration": record.iteration,
        "outcome_rate": record.outcome.mean,
        "low": record.outcome.low,
        "high": record.outcome.high,
        "num_conversations": record.num_conversations,
        "kl": record.kl,
        "decision": record.decision,
        "candidate": record.candidate,
        "difference": record.difference,
        "policy": record.policy.folder,
        "seconds": {name: round(stage.seconds, 2) for name, stage in record.stages.items()},
    }


def plot_learning_curve(records: Sequence[IterationRecord], optimum: float | None, folder: Path) -> tuple[Path, Path]:
    """Writes `learning_curve.png` and `.svg`: outcome rate by iteration with 95 % intervals, against the optimum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    iterations = [record.iteration for record in records]
    means = [record.outcome.mean for record in records]
    axes.fill_between(
        iterations,
        [record.outcome.low for record in records],
        [record.outcome.high for record in records],
        color="tab:blue",
        alpha=0.2,
        label="95 % interval",
    )
    axes.plot(iterations, means, color="tab:blue", label="policy in force")
    for record in records:
        fill = "white" if record.decision == "hold" else "tab:blue"
        axes.plot(record.iteration, record.outcome.mean, "o", color="tab:blue", markerfacecolor=fill)
    held = [record for record in records if record.decision == "hold" and record.candidate is not None]
    if held:
        rejected = [record.candidate.mean for record in held if record.candidate is not None]
        axes.plot([record.iteration for record in held], rejected, "x", color="tab:red", label="candidate held back")
    if optimum is not None:
        axes.axhline(optimum, color="black", linestyle="--", linewidth=1, label=f"optimum {optimum:.3f}")
    if all(record.outcome.low >= 0 and record.outcome.high <= 1 for record in records):
        axes.set_ylim(0, 1)
    axes.set(xlabel="iteration", ylabel="outcome (mean total reward of a conversation)", xticks=iterations)
    conversations = axes.secondary_xaxis("top")
    conversations.set_xticks(iterations, [f"{record.num_conversations:,}" for record in records], fontsize=8)
    conversations.set_xlabel("conversations collected", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    files = folder / "learning_curve.png", folder / "learning_curve.svg"
    for file in files:
        figure.savefig(file, dpi=150)
    plt.close(figure)
    return files


def sketch_learning_curve(records: Sequence[IterationRecord], optimum: float | None, *, height: int = 12) -> str:
    """The learning curve in characters: `o` the policy in force, `|` its 95 % interval, `-` the optimum."""
    values = [x for record in records for x in (record.outcome.low, record.outcome.high)]
    top = max([*values, optimum if optimum is not None else -float("inf")])
    bottom = min([*values, 0.0])
    step = (top - bottom) / (height - 1) or 1.0

    def row_of(value: float) -> int:
        return round((value - bottom) / step)

    lines = []
    for row in reversed(range(height)):
        is_optimum = optimum is not None and row == row_of(optimum)
        cells = []
        for record in records:
            if row == row_of(record.outcome.mean):
                mark = "o"
            elif row_of(record.outcome.low) <= row <= row_of(record.outcome.high):
                mark = "|"
            else:
                mark = "-" if is_optimum else " "
            cells.append(("-----" if is_optimum else "     ") + mark)
        lines.append(f"{bottom + row * step:>8.2f} ┤{''.join(cells)}{'  optimum' if is_optimum else ''}")
    lines.append(" " * 9 + "└" + "".join(f"{'─' * 5}┴" for _ in records))
    lines.append(" " * 10 + "".join(f"{record.iteration:>6}" for record in records) + "  iteration")
    return "\n".join(lines)


def print_q_report(report: QReport, console: Console) -> None:
    """Held-out quality of a Q-function in a few lines."""
    gain = report.state_only_gain
    console.print(
        f"Q on {report.num_conversations:,} held-out conversations ({report.num_points:,} decision points): "
        f"loss {report.loss:.4f}, constant predictor {report.constant_loss:.4f}, state only {report.state_only_loss:.4f} "
        f"(gain {_interval(gain, 4)}), {_discrimination(report)}, calibration error {report.ece:.3f}",
        highlight=False,
    )
    for warning in report.warnings:
        console.print(f"! {warning}", style="yellow", markup=False, highlight=False)


def plot_calibration(report: QReport, file: Path) -> None:
    """Writes the reliability diagram: predicted against observed, a dot for each tenth of the decision points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    predicted = [b.predicted for b in report.calibration]
    observed = [b.observed for b in report.calibration]
    ends = [min(predicted + observed), max(predicted + observed)]
    axes.plot(ends, ends, color="black", linestyle="--", linewidth=1, label="calibrated")
    axes.plot(predicted, observed, "o-", label=f"Q (ECE {report.ece:.3f})")
    axes.set(xlabel="predicted return", ylabel="observed return, held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _discrimination(report: QReport) -> str:
    name = "AUC" if report.measure == "auc" else "Spearman"
    return f"{name} {'-' if report.discrimination is None else f'{report.discrimination:.3f}'}"


def _interval(interval: Interval, digits: int) -> str:
    return f"{interval.mean:+.{digits}f}, {interval.low:+.{digits}f} to {interval.high:+.{digits}f}"


def print_folds(folds: dict[str, Any], console: Console) -> None:
    """What Q can tell about conversations left out, by share of the messages, beside the floor."""
    console.print(
        f"Q on {folds['num_conversations']:,} conversations, each predicted by a Q fitted to the other "
        f"{folds['num_folds'] - 1} of {folds['num_folds']} folds:",
        highlight=False,
    )
    rows = [("share of messages", {key: f"{key} %" for key in folds["auc"]}), ("Q, AUC", folds["auc"])]
    if folds["spearman"]:
        rows.append(("Q, Spearman", folds["spearman"]))
    rows.append(("TF-IDF, AUC", folds["tfidf_auc"]))
    for name, values in rows:
        cells = [
            f"{value:>8.3f}" if isinstance(value, float) else f"{'-' if value is None else value:>8}"
            for value in values.values()
        ]
        console.print(f"  {name:<18}{''.join(cells)}", highlight=False)
    console.print(f"  calibration error {folds['ece']:.3f}", highlight=False)


def print_step(metrics: dict[str, dict[str, Any]], console: Console) -> None:
    """What a step from logs found: the Q-function's quality, the improvement step, the cross-fitted gain."""
    for name in ("fit", "grader"):
        fit = metrics[name]
        gain = fit["state_only_gain"]
        discrimination = fit.get("auc", fit.get("spearman"))
        console.print(
            f"Q ({name}) held out: loss {fit['loss']:.4f}, constant predictor {fit['constant_loss']:.4f}, state only "
            f"{fit['state_only_loss']:.4f} (gain {gain['mean']:+.4f}, {gain['low']:+.4f} to {gain['high']:+.4f}), "
            f"{'AUC' if 'auc' in fit else 'Spearman'} {'-' if discrimination is None else f'{discrimination:.3f}'}",
            highlight=False,
        )
        for warning in fit["warnings"]:
            console.print(f"! {warning}", style="yellow", markup=False, highlight=False)
    num_dropped = metrics["fit"]["num_dropped_messages"] + metrics["grader"]["num_dropped_messages"]
    if num_dropped:
        console.print(f"{num_dropped:,} messages did not fit into the context of their prompts", highlight=False)
    num_cut = metrics["fit"]["num_cut_messages"] + metrics["grader"]["num_cut_messages"]
    if num_cut:
        console.print(f"{num_cut:,} single messages were longer than the context and were cut", highlight=False)
    if "folds" in metrics:
        print_folds(metrics["folds"], console)
    improve, grade = metrics["improve"], metrics["grade"]
    gain, own = grade["q_gain"], grade["q_gain_by_own_q"]
    made = (
        f"{improve['num_updates']} updates, stopped by {improve['stop_reason']}"
        if improve["num_updates"]
        else "imported"
    )
    console.print(f"improvement: {made}, KL {improve['kl']:.3f} nats a response", highlight=False)
    console.print(
        f"gain by the Q of the other half: {gain['mean']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f}), from "
        f"{grade['q_policy']:.4f} to {grade['q_candidate']:.4f} on {grade['num_prompts']:,} prompts; by the Q that "
        f"trained it: {own['mean']:+.4f}",
        highlight=False,
    )
    console.print(
        "within-state ranking: cannot be measured from logs alone, where each state has one response", highlight=False
    )


def print_ranking(ranking: Ranking, console: Console) -> None:
    """Within-state ranking in a few lines."""
    tau, ceiling = ranking.kendall_tau, ranking.ceiling
    regret, blind = ranking.regret, ranking.random_regret
    console.print(
        f"Kendall tau {tau.mean:.3f} ({tau.low:.3f} to {tau.high:.3f}) over {ranking.num_states} states, correlation within "
        f"states {ranking.correlation:.3f}; two halves of the rollouts agree with tau {ceiling.mean:.3f}",
        highlight=False,
    )
    console.print(
        f"regret of Q's choice {regret.mean:.3f} ({regret.low:.3f} to {regret.high:.3f}), of a random one {blind.mean:.3f} "
        f"({blind.low:.3f} to {blind.high:.3f})",
        highlight=False,
    )
    if not ranking.exact_branches:
        console.print(
            "! the environment has no branch(generator): all rollouts of a state share its hidden part, which a "
            "response cannot know",
            style="yellow",
            markup=False,
            highlight=False,
        )


def print_conformance(conformance: Conformance, console: Console) -> None:
    """A line a check, and the verdict."""
    for check in conformance.checks:
        verdict = "passed" if check.passed else "FAILED"
        console.print(
            f"{verdict}  {check.name:<16} {check.value:>8.3f} ({check.limit}): {check.meaning}",
            highlight=False,
            markup=False,
        )
    failed = [check.name for check in conformance.checks if not check.passed]
    console.print(
        "this step solves the single-turn problem that the paper needs"
        if conformance.passed
        else f"this step solves another problem than the paper needs: {', '.join(failed)}",
        highlight=False,
    )
