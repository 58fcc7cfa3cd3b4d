"""A look at one thing: Q on a log or within states, an improvement step, a policy in talk."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from iterative_ppo import report
from iterative_ppo.commands.arguments import environment_maker, load
from iterative_ppo.config import Config
from iterative_ppo.conformance import BackendError, backend_of, check_backend
from iterative_ppo.conformance_http import backend_at
from iterative_ppo.conversations import Conversation, Message, chat_messages
from iterative_ppo.entry_points import import_named
from iterative_ppo.improvement.backends import require_backend
from iterative_ppo.loading import load_q_function
from iterative_ppo.log_scores import LogScorer, score_log, write_scores
from iterative_ppo.ranking import rank_within_states
from iterative_ppo.run_directory import to_json
from iterative_ppo.supervised import Progress


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
