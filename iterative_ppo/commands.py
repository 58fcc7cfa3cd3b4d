"""What the commands do, from checked arguments to a JSON-ready result; the command line itself is `__main__`."""

import dataclasses
import os
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from iterative_ppo import distributed, report
from iterative_ppo.adapters import base_of
from iterative_ppo.config import Config, ConfigError
from iterative_ppo.conformance import BackendError, backend_of, check_backend
from iterative_ppo.conformance_http import backend_at
from iterative_ppo.conversation_log import BadLines, read_conversations
from iterative_ppo.conversations import Conversation, Message, chat_messages
from iterative_ppo.cross_validation import cross_validate, group_names
from iterative_ppo.entry_points import import_named
from iterative_ppo.environments import TextEnvironment, make_environment
from iterative_ppo.environments.rollout import RolloutStatistics, collect
from iterative_ppo.export import Stack, export_step
from iterative_ppo.from_logs import fit_q_from_logs, improve_from_logs, load_policy, load_q_function
from iterative_ppo.import_candidate import import_candidate
from iterative_ppo.improvement.backends import ExternalStepError, require_backend
from iterative_ppo.intervals import mean_interval
from iterative_ppo.log_scores import LogScorer, score_log, write_scores
from iterative_ppo.open_step import OpenStep, find_open_step
from iterative_ppo.policy import Policy
from iterative_ppo.policy_iteration import IterationRecord, iterate
from iterative_ppo.q_function import QFunction, load_card
from iterative_ppo.q_scoring import QScorer
from iterative_ppo.ranking import rank_within_states
from iterative_ppo.run_directory import RunDirectory, to_json, write_json, write_log
from iterative_ppo.stages import Stages, gate, total_reward
from iterative_ppo.step import Step, copy_log, keep_arguments
from iterative_ppo.supervised import Progress

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


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


def run_collect(
    config: Config, policy_source: str, out: Path, *, ray: str | None, progress: Progress, console: Console
) -> dict[str, Any]:
    """Conversations of a policy with the environment, as a log."""
    name = Path(policy_source).name or "policy"
    statistics = RolloutStatistics()
    rewards = array("d")

    def noted(conversations: Iterator[Conversation]) -> Iterator[Conversation]:
        for conversation in conversations:
            rewards.append(total_reward(conversation))
            yield conversation

    if ray is None:
        policy = load(config, policy_source)
        started = time.perf_counter()
        conversations = collect(
            policy,
            environment_maker(config),
            num_conversations=config.iterations.conversations,
            seed=config.seed,
            max_turns=config.environment.max_turns,
            lockstep=config.compute.rollout_conversations,
            name=name,
            statistics=statistics,
            progress=progress,
        )
    else:
        if distributed.world_size() > 1:
            raise ConfigError("--ray: starts its own processes; call it without torchrun")
        from iterative_ppo import with_ray

        started = time.perf_counter()
        conversations = with_ray.collect(
            config, policy_folder(policy_source), address=ray, name=name, statistics=statistics, progress=progress
        )
    write_log(out, noted(conversations))
    outcome = mean_interval(rewards)
    seconds = time.perf_counter() - started
    console.print(
        f"{len(rewards):,} conversations in {out}: outcome {outcome.mean:.3f} ({outcome.low:.3f} to {outcome.high:.3f}), "
        f"{statistics.num_turns / len(rewards):.1f} turns each, {len(rewards) / seconds:.0f} a second",
        highlight=False,
    )
    return dict(to_json({"out": out, "outcome": outcome, "seconds": seconds, "statistics": statistics}))


def run_fit(
    config: Config,
    logs: Path,
    policy_source: str,
    out: Path | None,
    *,
    num_folds: int,
    group: str | None,
    bad_lines: BadLines,
    progress: Progress,
    console: Console,
) -> dict[str, Any]:
    """A Q-function from logs; with folds, what it can tell about conversations left out."""
    started = time.perf_counter()
    policy = load(config, policy_source)
    conversations = read_log(logs, bad_lines)
    if out is not None:
        empty_folder(out)
    groups = group_names(conversations, group)
    result: dict[str, Any] = {}
    if num_folds:
        folds = cross_validate(
            config,
            policy,
            conversations,
            num_folds=num_folds,
            groups=groups,
            seed=config.seed,
            progress=progress,
        )
        result |= to_json(folds)
        report.print_folds(result, console)
    if out is not None:
        fitted = fit_q_from_logs(
            config,
            policy,
            conversations,
            name=policy_source,
            seed=config.seed,
            progress=progress,
            groups=groups,
        )
        fitted.save(out)
        report.print_q_report(fitted.report, console)
        if distributed.is_main():
            report.plot_calibration(fitted.report, out / "calibration.png")
        console.print(f"Q-function {out / 'q_function'}", highlight=False)
        result |= {"q_function": str(out / "q_function"), "report": to_json(fitted.report)}
    return result | {"seconds": round(time.perf_counter() - started, 2)}


def run_score(
    config: Config, logs: Path, q_folder: Path, out: Path, *, ray: str | None, progress: Progress, console: Console
) -> dict[str, Any]:
    """Q, the state's value and the reward of every decision point of a log."""
    started = time.perf_counter()
    if ray is None:
        scores = score_log(LogScorer.load(q_folder, config), logs, progress=progress)
    else:
        from iterative_ppo import with_ray

        scores = with_ray.score(config, q_folder, logs, address=ray, progress=progress)
    totals = write_scores(out, scores)
    seconds = time.perf_counter() - started
    means = totals.means()
    console.print(
        f"{totals.num_points:,} decision points in {out}: mean Q {means['mean_q_value']:.4f}, of the state "
        f"{means['mean_state_value']:.4f}, reward {means['mean_reward']:.4f}; {totals.num_points / seconds:.0f} a second",
        highlight=False,
    )
    return {"out": str(out), "num_points": totals.num_points, **means, "seconds": round(seconds, 2)}


def run_improve(
    config: Config,
    logs: Path,
    policy_source: str,
    q_source: str,
    out: Path,
    *,
    bad_lines: BadLines,
    progress: Progress,
    console: Console,
) -> dict[str, Any]:
    """One improvement step on the prompts of logs."""
    policy = load(config, policy_source)
    q_function = load_q_function(q_source, policy)
    conversations = read_log(logs, bad_lines)
    empty_folder(out)
    metrics = improve_from_logs(
        config,
        policy,
        q_function,
        conversations,
        out,
        seed=config.seed,
        progress=progress,
    )
    console.print(
        f"candidate {out / 'policy'}: Q reward {metrics['reward_first']:.4f} to {metrics['reward_last']:.4f} in "
        f"{metrics['num_updates']} updates, KL {metrics['kl']:.3f} nats a response, stopped by {metrics['stop_reason']}",
        highlight=False,
    )
    return metrics | {"policy": str(out / "policy")}


def run_export(stack: Stack, run: Path, out: Path, *, console: Console) -> dict[str, Any]:
    """A folder from which another stack makes the improvement step at which a run stands."""
    step = find_open_step(run)
    empty_folder(out)
    manifest = export_step(step, stack, out)
    console.print(f"{out}: {step.name} of {run} for {stack}, {manifest['num_prompts']:,} prompts", highlight=False)
    for reason, count in manifest["num_left_out"].items():
        console.print(f"! {count:,} prompts are left out: {reason}", style="yellow", highlight=False, markup=False)
    start = f"python {out / 'train.py'}" if stack == "trl" else f"ippo serve-q {run}, and bash {out / 'launch.sh'}"
    console.print(f"next: {start}, in the environment of {stack}", highlight=False, markup=False)
    return {"out": str(out), **to_json({key: value for key, value in manifest.items() if key != "files"})}


def run_import(run: Path, source: Path, *, console: Console) -> dict[str, Any]:
    """The policy that another stack trained, as the candidate of the step at which a run stands."""
    step = find_open_step(run)
    metrics = import_candidate(step, Path(policy_folder(str(source)))).metrics
    console.print(
        f"candidate {run / step.name / 'policy'}: Q reward {metrics['reward_first']:.4f} to {metrics['reward_last']:.4f}, "
        f"KL {metrics['kl']:.3f} nats a response",
        highlight=False,
    )
    if metrics["kl"] > metrics["kl_target"]:
        console.print(
            f"! beyond the budget of {metrics['kl_target']:g} (improvement.kl_target): Q was not fitted to such responses",
            style="yellow",
            highlight=False,
            markup=False,
        )
    console.print(f"next: {resume_command(step)}", highlight=False, markup=False)
    return {"run": str(run), "step": step.name, **metrics}


def wait_for_import(step: OpenStep, console: Console) -> dict[str, Any]:
    """Says what hands the improvement step to another stack and what takes its result back."""
    console.print(
        f"{step.run / step.name} is to be made by another stack:\n"
        f"  ippo export verl|openrlhf|trl {step.run} --out EXPORT\n"
        f"  ippo import {step.run} --policy CANDIDATE\n"
        f"  {resume_command(step)}",
        highlight=False,
        markup=False,
    )
    return {"run": str(step.run), "waiting_for": step.name}


def resume_command(step: OpenStep) -> str:
    """What goes on with a run."""
    command = f"ippo iterate {step.run / 'config.toml'}"
    if step.is_from_logs:
        arguments = step.arguments()
        command = f"ippo step --logs {step.run / 'conversations.jsonl'} --config {step.run / 'config.toml'}"
        command += f" --folds {arguments['folds']}" + (f" --group {arguments['group']}" if arguments["group"] else "")
    return f"{command} --out {step.run} --resume"


def run_merge(config: Config, source: Path, out: Path, *, console: Console) -> dict[str, Any]:
    """A plain folder from a policy's or a Q-function's adapter folder."""
    is_q_function = (source / "q_function.json").is_file()
    folder = str(source) if is_q_function else policy_folder(str(source))
    base = base_of(folder)
    if base is None:
        raise ValueError(f"{folder}: holds no adapter: there is nothing to merge")
    empty_folder(out)
    if is_q_function:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        QFunction.load(folder).merged().save(out, load_card(folder), tokenizer)
    else:
        Policy.load(folder, config.policy).merged().save(out)
    console.print(f"{out}: {folder} merged into {base}", highlight=False)
    return {"out": str(out), "base": base}


def run_evaluate(
    config: Config, policy_source: str, against: str | None, *, progress: Progress, console: Console
) -> dict[str, Any]:
    """True outcome of a policy in the environment, alone or against another on common random numbers."""

    def rewards(source: str) -> list[float]:
        return [
            total_reward(conversation)
            for conversation in collect(
                load(config, source),
                environment_maker(config),
                num_conversations=config.evaluation.conversations,
                seed=config.seed,
                max_turns=config.environment.max_turns,
                lockstep=config.compute.rollout_conversations,
                name=Path(source).name or "policy",
                progress=progress,
            )
        ]

    optimum = known_optimum(environment_maker(config)())
    own = rewards(policy_source)
    outcome = mean_interval(own)
    result: dict[str, Any] = {"policy": policy_source, "outcome": to_json(outcome), "optimum": optimum}
    console.print(f"{policy_source}: {outcome.mean:.3f} ({outcome.low:.3f} to {outcome.high:.3f})", highlight=False)
    if against is not None:
        trial = gate(own, rewards(against), confidence=config.evaluation.confidence)
        console.print(
            f"{against}: {trial.current.mean:.3f} ({trial.current.low:.3f} to {trial.current.high:.3f})",
            highlight=False,
        )
        console.print(
            f"difference {trial.difference.mean:+.3f}, one-sided lower bound {trial.difference.low:+.3f}: {trial.decision}",
            highlight=False,
        )
        result |= {"against": against, "trial": to_json(trial)}
    return result


def run_rank(
    config: Config,
    policy_source: str,
    q_source: str,
    *,
    num_states: int,
    num_responses: int,
    num_rollouts: int,
    progress: Progress,
    console: Console,
) -> dict[str, Any]:
    """How well Q ranks responses to the same prompt, against rollouts of each."""
    policy = load(config, policy_source)
    ranking = rank_within_states(
        policy,
        load_q_function(q_source, policy),
        environment_maker(config),
        num_states=num_states,
        num_responses=num_responses,
        num_rollouts=num_rollouts,
        max_turns=config.environment.max_turns,
        lockstep=config.compute.rollout_conversations,
        tokens_per_batch=config.compute.tokens_per_batch,
        seed=config.seed,
        progress=progress,
    )
    report.print_ranking(ranking, console)
    return dict(to_json(ranking))


def run_conformance(config: Config, backend: str, *, progress: Progress, console: Console) -> dict[str, Any]:
    """What an improvement step does with problems whose answer is known."""
    algorithm = config.improvement.algorithm
    match backend:
        case "native":
            improve = backend_of("native")
        case "trl":
            improve = backend_of("trl")
            algorithm = "rloo" if algorithm == "ppo" else algorithm
            require_backend(dataclasses.replace(config.improvement, backend="trl"))
        case _ if backend.startswith(("http://", "https://")):
            improve = backend_at(backend)
        case _:
            improve = import_named(backend, what="backend", known="neither native, trl, a URL", kind="function")
    console.print(f"{backend}, {algorithm}", highlight=False)
    try:
        result = check_backend(
            improve, algorithm=algorithm, kl_in=config.improvement.kl_in, seed=config.seed, progress=progress
        )
    except BackendError as error:
        raise ValueError(f"{backend}: {error}") from error
    report.print_conformance(result, console)
    return dict(to_json(result))


def run_chat(
    config: Config,
    policy_source: str,
    q_source: str | None,
    system: str | None,
    *,
    ask: Callable[[], str | None],
    console: Console,
) -> Conversation:
    """A person plays the customer; returns what was said."""
    policy = load(config, policy_source)
    q_function = load_q_function(q_source, policy) if q_source else None
    generator = np.random.default_rng(config.seed)
    messages = [Message(role="system", content=system)] if system else []
    while (text := ask()) is not None:
        messages.append(Message(role="user", content=text))
        prompt = policy.renderer.prompt(chat_messages(messages))
        [response] = policy.respond([prompt.token_ids], generator.random((1, config.policy.max_response_tokens)))
        answer = policy.renderer.response_text(response)
        note = ""
        if q_function is not None:
            value = q_function.values([prompt.token_ids], [response], tokens_per_batch=config.compute.tokens_per_batch)
            note = f"  (Q {float(value):.3f})"
        console.print(f"policy: {answer}{note}", highlight=False, markup=False)
        messages.append(Message(role="assistant", content=answer))
    return Conversation(id="chat", messages=tuple(messages), end="censored")


def run_serve_q(config: Config, folder: Path, *, host: str, port: int, console: Console) -> dict[str, Any]:
    """A Q-function over HTTP until the process is told to stop; the extra `serve` must be installed."""
    from iterative_ppo import q_server

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    num_answered = q_server.serve(folder, lambda: QScorer.load(folder, config), host=host, port=port, say=say)
    say(f"stopped: {num_answered:,} items answered")
    return {"q_function": str(folder), "num_answered": num_answered}


def load(config: Config, source: str) -> Policy:
    """A policy from a hub id or a folder; also from a stage's folder that holds one."""
    return load_policy(config, policy_folder(source))


def policy_folder(source: str) -> str:
    """Where a policy's weights are: the source itself, or the `policy` in a stage's folder."""
    inner = Path(source) / "policy"
    return str(inner) if inner.is_dir() else source


def read_log(logs: Path, bad_lines: BadLines) -> list[Conversation]:
    """The conversations of a log; of several processes the main one sets bad lines aside."""
    rejects = None if distributed.is_main() else Path(os.devnull)
    return list(read_conversations(logs, bad_lines=bad_lines, rejects=rejects))


def environment_maker(config: Config) -> Callable[[], TextEnvironment]:
    """Makes the configured environment."""
    return lambda: make_environment(config.environment.entry_point, config.environment.arguments)


def known_optimum(environment: TextEnvironment) -> float | None:
    """The best attainable outcome, where the environment can tell: its method `optimum()`."""
    optimum = getattr(environment, "optimum", None)
    return float(optimum()) if callable(optimum) else None


def empty_folder(path: Path) -> None:
    """Makes a folder for results; ValueError where it already holds something."""

    def make() -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path}: exists and is not an empty folder; choose another with --out")
        path.mkdir(parents=True, exist_ok=True)

    distributed.on_main(make)
