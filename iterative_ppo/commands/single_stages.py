"""One stage of an iteration by itself: collect, fit, improve, evaluate."""

import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from iterative_ppo import distributed, report
from iterative_ppo.commands.arguments import (
    empty_folder,
    environment_maker,
    known_optimum,
    load,
    policy_folder,
    read_log,
)
from iterative_ppo.config import Config, ConfigError
from iterative_ppo.conversation_log import BadLines
from iterative_ppo.conversations import Conversation
from iterative_ppo.cross_validation import cross_validate, group_names
from iterative_ppo.environments.rollout import RolloutStatistics, collect
from iterative_ppo.from_logs import improve_from_logs
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.intervals import mean_interval
from iterative_ppo.loading import load_q_function
from iterative_ppo.q_from_logs import fit_q_from_logs
from iterative_ppo.run_directory import to_json, write_log
from iterative_ppo.stages import gate, total_reward
from iterative_ppo.supervised import Progress


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
    features = FeatureCache()
    if num_folds:
        folds = cross_validate(
            config,
            policy,
            conversations,
            num_folds=num_folds,
            groups=groups,
            seed=config.seed,
            features=features,
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
            features=features,
        )
        fitted.save(out)
        report.print_q_report(fitted.report, console)
        if distributed.is_main():
            report.plot_calibration(fitted.report, out / "calibration.png")
        console.print(f"Q-function {out / 'q_function'}", highlight=False)
        result |= {"q_function": str(out / "q_function"), "report": to_json(fitted.report)}
    return result | {"seconds": round(time.perf_counter() - started, 2)}


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
