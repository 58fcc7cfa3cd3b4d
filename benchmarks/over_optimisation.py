"""Q reward against true outcome over the updates of one improvement step: where does PPO begin to exploit Q?

Takes the policy, conversations and Q-function of one iteration of a finished run, makes an improvement step with a KL
budget far beyond the default, and evaluates the policy in the simulator after every few updates.

    ippo iterate --out runs/a --set iterations.count=1
    python benchmarks/over_optimisation.py runs/a/iteration-001 --out over_optimisation.png

Prints one line an evaluation and, last, one JSON object.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import matplotlib
import numpy as np

from iterative_ppo import config as config_module
from iterative_ppo.conversation_log import read_conversations
from iterative_ppo.environments import make_environment
from iterative_ppo.environments.rollout import collect
from iterative_ppo.improvement.base import UpdateMetrics
from iterative_ppo.improvement.native import improve
from iterative_ppo.intervals import mean_interval
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, TokenValue
from iterative_ppo.q_reward import q_reward
from iterative_ppo.stages import total_reward
from iterative_ppo.turns_to_tokens import all_prompts, tokenize

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def measure(
    iteration: Path, settings: list[str], *, every: int, num_conversations: int, seed: int
) -> list[dict[str, float]]:
    """One row an evaluation: update, kl, q_reward, outcome, low, high."""
    tables = config_module.load(iteration.parent / "config.toml")
    for setting in settings:
        tables = config_module.with_setting(tables, setting)
    config = config_module.from_dict(tables)
    parents = json.loads((iteration / "fit" / "manifest.json").read_text())["parents"]
    policy = Policy.load(iteration.parent / parents["policy"] / "policy", config.policy)
    q_function = QFunction.load(iteration / "fit" / "q_function", backbone=policy.model)
    conversations = read_conversations(iteration / "collect" / "conversations.jsonl")
    tokens_per_batch = config.compute.tokens_per_batch
    rows: list[dict[str, float]] = []

    def evaluate(metrics: UpdateMetrics, current: Policy) -> None:
        if metrics.update % every:
            return
        talks = collect(
            current,
            lambda: make_environment(config.environment.entry_point, config.environment.arguments),
            num_conversations=num_conversations,
            seed=10_000 + seed,
            max_turns=config.environment.max_turns,
            lockstep=config.compute.rollout_conversations,
            name="evaluation",
        )
        outcome = mean_interval([total_reward(talk) for talk in talks])
        rows.append(
            {
                "update": metrics.update + 1,
                "kl_before": metrics.kl,
                "q_reward_before": metrics.reward_mean,
                "entropy": metrics.entropy,
                "outcome": outcome.mean,
                "low": outcome.low,
                "high": outcome.high,
            }
        )
        print(" ".join(f"{name} {value:.4f}" for name, value in rows[-1].items()), flush=True)

    improve(
        policy,
        all_prompts(tokenize(conversation, policy.renderer) for conversation in conversations),
        q_reward(q_function, pessimism=config.q_function.pessimism, tokens_per_batch=tokens_per_batch),
        dataclasses.replace(config.improvement, kl_target=1e9, adaptive_kl=False),
        token_value=TokenValue(q_function),
        generator=np.random.default_rng(seed),
        tokens_per_batch=tokens_per_batch,
        on_update=evaluate,
    )
    return rows


def plot(rows: list[dict[str, float]], out: Path) -> None:
    """Q reward, true outcome and KL by update; reward and KL of an update are those of the policy before it."""
    figure, (axes, below) = plt.subplots(2, 1, figsize=(7, 5), height_ratios=(3, 1), sharex=True, layout="constrained")
    before = [row["update"] - 1 for row in rows]
    after = [row["update"] for row in rows]
    axes.plot(before, [row["q_reward_before"] for row in rows], "o-", color="tab:orange", label="Q reward (mean)")
    axes.plot(after, [row["outcome"] for row in rows], "s-", color="tab:blue", label="true outcome rate, 95 %")
    axes.fill_between(after, [row["low"] for row in rows], [row["high"] for row in rows], color="tab:blue", alpha=0.2)
    axes.set(ylabel="rate", ylim=(0, 1))
    axes.legend()
    below.plot(before, [row["kl_before"] for row in rows], "o-", color="tab:gray")
    below.set(xlabel="updates", ylabel="KL to the anchor,\nnats a response", ylim=(0, None))
    for part in (axes, below):
        part.grid(alpha=0.3)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("iteration", type=Path, help="an iteration's folder, as runs/a/iteration-001")
    parser.add_argument("--out", type=Path, help="picture to write")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="section.key=value")
    parser.add_argument("--every", type=int, default=1, help="updates between evaluations")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = measure(
        arguments.iteration,
        arguments.settings,
        every=arguments.every,
        num_conversations=arguments.conversations,
        seed=arguments.seed,
    )
    if arguments.out:
        plot(rows, arguments.out)
    print(json.dumps({"iteration": str(arguments.iteration), "settings": arguments.settings, "rows": rows}))


if __name__ == "__main__":
    main()
