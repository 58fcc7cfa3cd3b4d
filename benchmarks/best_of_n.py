"""The outcome of best-of-n by Q: a bound on what an optimiser can get out of one iteration's Q-function.

Plays the simulator with the policy of one iteration of a run, each time sampling n responses and sending the one that
the iteration's Q-function likes best. Its KL to the policy is at most log n - (n - 1)/n.

    ippo iterate --out runs/a --set iterations.count=2
    python benchmarks/best_of_n.py runs/a/iteration-002

Prints a line for each n and, last, one JSON object.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from iterative_ppo import config as config_module
from iterative_ppo.conversations import chat_messages
from iterative_ppo.environments import make_environment
from iterative_ppo.environments.rollout import Talk, start_talk
from iterative_ppo.intervals import mean_interval
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction


def play(policy: Policy, q_function: QFunction, talks: list[Talk], n: int, config: config_module.Config) -> list[float]:
    """Total reward of each talk, all of them in lock-step."""
    generator = np.random.default_rng(0)
    while running := [talk for talk in talks if talk.end is None]:
        prompts = [policy.renderer.prompt(chat_messages(talk.messages)).token_ids for talk in running]
        rows = [prompt for prompt in prompts for _ in range(n)]
        responses = policy.respond(rows, generator.random((len(rows), config.policy.max_response_tokens)))
        q_value = q_function.values(rows, responses, tokens_per_batch=config.compute.tokens_per_batch)
        for i, (talk, best) in enumerate(zip(running, q_value.view(-1, n).argmax(1).tolist(), strict=True)):
            text = policy.renderer.response_text(responses[i * n + best])
            talk.say(text, None, max_turns=config.environment.max_turns)
    return [talk.total_reward for talk in talks]


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("iteration", type=Path, help="an iteration's folder, as runs/a/iteration-002")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    config = config_module.from_dict(config_module.load(arguments.iteration.parent / "config.toml"))
    parents = json.loads((arguments.iteration / "fit" / "manifest.json").read_text())["parents"]
    policy = Policy.load(arguments.iteration.parent / parents["policy"] / "policy", config.policy)
    q_function = QFunction.load(arguments.iteration / "fit" / "q_function", backbone=policy.model)
    rows = []
    for n in arguments.n:
        talks = [
            start_talk(
                make_environment(config.environment.entry_point, config.environment.arguments),
                name=f"talk-{index}",
                seed=config.seed + 10_000,
                index=index,
            )
            for index in range(arguments.conversations)
        ]
        outcome = mean_interval(play(policy, q_function, talks, n, config))
        rows.append({"n": n, "largest_kl": math.log(n) - (n - 1) / n, "outcome": outcome.mean, "low": outcome.low})
        print(
            f"n {n}: {outcome.mean:.3f} ({outcome.low:.3f} to {outcome.high:.3f}), KL at most {rows[-1]['largest_kl']:.2f}"
        )
    print(json.dumps({"iteration": str(arguments.iteration), "rows": rows}))


if __name__ == "__main__":
    main()
