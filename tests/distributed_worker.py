"""What test_distributed.py compares: the same work, done by one process there and by two in `torchrun` here."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from rich.console import Console
from test_improvement import PROMPTS, config_of, says_a
from test_q_function import by_response, make_logs
from test_rollout import Game
from torch.distributed.tensor import DTensor

from iterative_ppo import config as config_module
from iterative_ppo import distributed
from iterative_ppo.commands import loop, single_stages
from iterative_ppo.config import QFunctionConfig
from iterative_ppo.conversation_log import conversation_to_dict
from iterative_ppo.environments.rollout import RolloutStatistics, collect, collect_scripted
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.improvement.native import improve
from iterative_ppo.policy import Policy
from iterative_ppo.q_fit import fit_q_function, predict
from iterative_ppo.q_function import QFunction, QFunctionCard, TokenValue
from iterative_ppo.read_out import fit_read_out
from iterative_ppo.run_directory import RunDirectory
from iterative_ppo.supervised import no_progress

TOKENS = 128  # several micro-batches a step, and not the same number in each process
Results = dict[str, Any]


def policy_of(folder: Path, **options: bool) -> Policy:
    return Policy.load(folder, tiny.policy_config(), **options)


def q_function_of(policy: Policy) -> QFunction:
    return QFunction.from_policy(policy.model, link="logistic", num_heads=2, pad_id=tiny.PAD, lora_rank=0, seed=0)


def fit(folder: Path, **options: bool) -> Results:
    """17 training rows: steps of 8, 8 and 1, of which the last leaves a process without a row."""
    logs = make_logs(24, by_response, seed=0)
    q_function = q_function_of(policy_of(folder, **options))
    history = fit_q_function(
        q_function,
        logs.sequences,
        held_out=[row >= 17 for row in range(24)],
        config=QFunctionConfig(max_passes=3, patience_passes=3, num_heads=2, learning_rate=3e-3),
        tokens_per_batch=TOKENS,
        generator=np.random.default_rng(0),
    )
    return {
        "weights": weights_of(q_function),
        "losses": [*history.train_losses, *history.held_out_losses],
        "q_value": predict(q_function, logs.sequences, tokens_per_batch=TOKENS).q_value,
    }


def squared_error_fit(folder: Path) -> Results:
    """Returns far from 0: the heads start from a ridge regression over all rows."""
    logs = make_logs(24, by_response, seed=0)
    policy = policy_of(folder)
    q_function = QFunction.from_policy(policy.model, link="identity", num_heads=1, pad_id=tiny.PAD, lora_rank=0, seed=0)
    settings = {"link": "identity", "loss": "squared_error", "num_heads": 1, "max_passes": 2, "learning_rate": 3e-3}
    history = fit_q_function(
        q_function,
        logs.sequences,
        held_out=[False] * 24,
        config=QFunctionConfig(**settings),
        tokens_per_batch=TOKENS,
        generator=np.random.default_rng(0),
    )
    return {"weights": weights_of(q_function), "losses": [*history.train_losses, *history.held_out_losses]}


def read_out_fit(folder: Path) -> Results:
    """Each process reads the features of its share, and the heads are fitted to those of all."""
    logs = make_logs(24, by_response, seed=0)
    q_function = QFunction.on_base(policy_of(folder).model, depth=1.0, link="logistic", num_heads=2, marks=tiny.MARKS)
    features = FeatureCache()
    history = fit_read_out(
        q_function,
        logs.sequences,
        held_out=[row >= 17 for row in range(24)],
        config=QFunctionConfig(num_heads=2, max_passes=2, patience_passes=2),
        features=features,
        tokens_per_batch=TOKENS,
        generator=np.random.default_rng(0),
        retarget=lambda predictions: [(float(q), 0.5) for q in predictions.q_value[::2]],
    )
    return {
        "weights": weights_of(q_function),
        "losses": [*history.train_losses, *history.held_out_losses],
        "q_value": predict(q_function, logs.sequences, tokens_per_batch=TOKENS, features=features).q_value,
        "q_value_read": predict(q_function, logs.sequences, tokens_per_batch=TOKENS).q_value,
    }


def improvement(folder: Path, algorithm: str, **options: bool) -> Results:
    policy = policy_of(folder, **options)
    result = improve(
        policy,
        PROMPTS,
        says_a,
        config_of(algorithm, num_updates=2, learning_rate=1e-3, token_value_learning_rate=1e-3),
        token_value=TokenValue(q_function_of(policy)),
        generator=np.random.default_rng(0),
        tokens_per_batch=TOKENS,
    )
    metrics = [
        [u.reward_mean, u.kl, u.entropy, u.clip_fraction, u.response_tokens, u.num_passes] for u in result.updates
    ]
    return {
        "weights": weights_of(result.candidate.model),
        "metrics": np.array(metrics),
        "kl": result.kl,
        "stop_reason": result.stop_reason,
    }


def rollouts(folder: Path, **options: bool) -> Results:
    """13 conversations, 3 at a time in each process."""
    statistics = RolloutStatistics()
    games: list[Game] = []

    def make() -> Game:
        games.append(Game())
        return games[-1]

    conversations = collect(
        policy_of(folder, **options),
        make,
        num_conversations=13,
        seed=3,
        max_turns=9,
        lockstep=3,
        name="p",
        statistics=statistics,
    )
    log = [conversation_to_dict(conversation) for conversation in conversations]
    scripted = collect_scripted(Game, num_conversations=13, seed=3, max_turns=9)
    return {
        "log": log,
        "own_resets": sum(len(game.totals) for game in games),
        "scripted": [conversation_to_dict(conversation) for conversation in scripted],
        "num_turns": statistics.num_turns,
    }


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the parameters that are trained, whole."""
    return {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def commands_of(folder: Path, out: Path) -> Results:
    """What the commands hand back, each on what those before have written."""
    config = config_module.from_dict(
        {
            "environment": {"entry_point": "test_rollout:Game", "max_turns": 4},
            "policy": {"start": str(folder), "max_response_tokens": 8, "context_tokens": 512},
            "iterations": {"conversations": 24},
            "evaluation": {"conversations": 12},
            "q_function": {"link": "identity", "loss": "squared_error", "num_heads": 2, "max_passes": 1},
            "improvement": {"num_updates": 1, "prompts_per_update": 16},
            "compute": {"rollout_conversations": 8},
        }
    )
    policy, log = str(folder), out / "log.jsonl"
    shown: dict[str, Any] = {"console": Console(quiet=True), "progress": no_progress}
    read: dict[str, Any] = {"group": None, "bad_lines": "error"}
    commands: dict[str, Callable[[], Any]] = {
        "collect": lambda: single_stages.run_collect(config, policy, log, ray=None, **shown),
        "fit": lambda: single_stages.run_fit(config, log, policy, out / "q", num_folds=2, **read, **shown),
        "improve": lambda: single_stages.run_improve(
            config, log, policy, str(out / "q/q_function"), out / "candidate", bad_lines="error", **shown
        ),
        "evaluate": lambda: single_stages.run_evaluate(config, policy, str(out / "candidate"), **shown),
        "step": lambda: loop.run_step(config, log, out / "step", num_folds=0, resume=False, **read, **shown),
    }
    results = {}
    for name, command in commands.items():
        results[name] = command()
        distributed.wait_for_all()  # as between launches: what the main process writes is there for the next
    return results


def saved(folder: Path, out: Path) -> Results:
    """What is kept of a sharded policy and its Q in a process, and what is read back from their folders."""
    policy = policy_of(folder, shard_weights=True)
    q_function = q_function_of(policy)
    card = QFunctionCard(link="logistic", gamma=1.0, target="monte_carlo", policy="p", metrics={})
    policy.branch(seed=0).save(out / "policy")
    q_function.save(out / "q", card, policy.tokenizer)
    distributed.from_main(None)
    again = QFunction.load(out / "q", backbone=policy.model)
    return {
        "share": [
            sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
            for model in (policy.model, q_function.model, again.model, policy.branch(seed=0).model)
        ],
        "weights": weights_of(policy.model),
        "q_weights": weights_of(q_function),
        "q_weights_again": weights_of(again),
    }


CASES: dict[str, Callable[[Path], Results]] = {
    "fit": fit,
    "squared_error_fit": squared_error_fit,
    "read_out_fit": read_out_fit,
    "ppo": lambda folder: improvement(folder, "ppo"),
    "grpo": lambda folder: improvement(folder, "grpo"),
    "rollouts": rollouts,
    "sharded_fit": lambda folder: fit(folder, shard_weights=True),
    "sharded_ppo": lambda folder: improvement(folder, "ppo", shard_weights=True),
    "sharded_grpo": lambda folder: improvement(folder, "grpo", shard_weights=True, checkpoint_activations=True),
    "sharded_rollouts": lambda folder: rollouts(folder, shard_weights=True),
}
"""In one process nothing is sharded."""


def late_reader(out: Path) -> str:
    """A stage that the second process is slow in: what it reads of the stage's folder after the main one is through."""

    def make(folder: Path) -> dict[str, str]:
        if distributed.is_main():
            (folder / "note.txt").write_text("read in time")
        else:
            time.sleep(2)
        return {"note": (folder / "note.txt").read_text()}

    directory = RunDirectory(out / "late", config_module.Config(), resume=False)
    return str(directory.stage("start", seed=0, parents={}, make=make).metrics["note"])


def main(folder: Path, out: Path) -> None:
    """Does every case and notes what this process ended with."""
    torch.set_num_threads(1)
    distributed._BUCKET_NUMBERS = 1000  # several messages for the gradients of a tiny model
    with distributed.processes():
        results = {name: case(folder) for name, case in CASES.items()}
        results["commands"] = commands_of(folder, out)
        results["saved"] = saved(folder, out)
        results["late_reader"] = late_reader(out)
        results["world_size"] = distributed.world_size()
        torch.save(results, out / f"{distributed.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
