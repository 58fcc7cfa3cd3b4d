"""The loop, and one iteration of it from logs alone."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from iterative_ppo import distributed, report
from iterative_ppo.commands.arguments import environment_maker, known_optimum
from iterative_ppo.commands.exchange import wait_for_import
from iterative_ppo.config import Config
from iterative_ppo.conversation_log import BadLines
from iterative_ppo.improvement.backends import ExternalStepError
from iterative_ppo.open_step import find_open_step
from iterative_ppo.policy_iteration import IterationRecord, iterate
from iterative_ppo.run_directory import RunDirectory, to_json, write_json
from iterative_ppo.stages import Stages
from iterative_ppo.step import Step, copy_log, keep_arguments
from iterative_ppo.supervised import Progress


def run_iterate(config: Config, out: Path, *, resume: bool, console: Console, progress: Progress) -> dict[str, Any]:
    """The whole loop; prints a line an iteration and writes the learning curve after each."""
    started = time.perf_counter()
    out = distributed.from_main(out)  # a default one is named by the clock
    maker = environment_maker(config)
    optimum = known_optimum(maker())
    directory = RunDirectory(out, config, resume=resume)
    stages = Stages(directory, maker, progress)
    records: list[IterationRecord] = []
    console.print(f"run folder {out}" + ("" if optimum is None else f", optimum {optimum:.3f}"), highlight=False)
    console.print(report.iteration_header(), highlight=False)
    try:
        for record in iterate(stages, count=config.iterations.count):
            records.append(record)
            console.print(report.iteration_line(record), highlight=False)
            for warning in record.stages["fit"].metrics["warnings"] if "fit" in record.stages else ():
                console.print(f"{'':>11}! {warning}", style="yellow", highlight=False, markup=False)
            if distributed.is_main():
                report.plot_learning_curve(records, optimum, out)
    except ExternalStepError:
        waiting = wait_for_import(find_open_step(out), console)
        return waiting | {"iterations": to_json([report.iteration_json(record) for record in records])}
    final = stages.final(config.iterations.count, records[-1].policy)
    console.print(report.sketch_learning_curve(records, optimum), highlight=False, markup=False)
    figure = final.metrics
    console.print(
        f"final policy {records[-1].policy.folder / 'policy'}: {figure['mean']:.3f} "
        f"({figure['low']:.3f} to {figure['high']:.3f}) on {config.evaluation.conversations:,} more conversations"
        + ("" if optimum is None or optimum <= 0 else f", {figure['mean'] / optimum:.0%} of the optimum"),
        highlight=False,
    )
    console.print(f"learning curve {out / 'learning_curve.png'}", highlight=False)
    result = to_json(
        {
            "run": out,
            "optimum": optimum,
            "seconds": round(time.perf_counter() - started, 2),
            "iterations": [report.iteration_json(record) for record in records],
            "final": {"outcome_rate": figure["mean"], "low": figure["low"], "high": figure["high"]},
        }
    )
    write_json(out / "result.json", result)
    return dict(result)


def run_step(
    config: Config,
    logs: Path,
    out: Path,
    *,
    num_folds: int,
    group: str | None,
    bad_lines: BadLines,
    resume: bool,
    console: Console,
    progress: Progress,
) -> dict[str, Any]:
    """One iteration from logs alone."""
    started = time.perf_counter()
    directory = RunDirectory(out, config, resume=resume)
    keep_arguments(directory, {"group": group, "folds": num_folds})
    conversations = copy_log(logs, directory, bad_lines=bad_lines)
    try:
        result = Step(directory, conversations, logs, group=group, progress=progress).run(num_folds=num_folds)
    except ExternalStepError:
        return wait_for_import(find_open_step(out), console)
    metrics = {name: stage.metrics for name, stage in result.stages.items()}
    report.print_step(metrics, console)
    console.print(f"candidate {result.stages['improve'].folder / 'policy'}", highlight=False)
    console.print(f"answers before and after {result.stages['grade'].folder / 'samples.md'}", highlight=False)
    summary: dict[str, Any] = to_json(
        {
            "run": out,
            "candidate": result.stages["improve"].folder / "policy",
            "seconds": round(time.perf_counter() - started, 2),
            **metrics,
        }
    )
    write_json(out / "result.json", summary)
    return summary
