"""Rollouts with the conversation's cache kept, against encoding every prompt from its beginning.

Plays conversations of 2, 4, 8, 16 and 32 turns with the same model, customers and random numbers both ways, checks that
both give the same conversations, and alternates the two in each repetition.

    python benchmarks/rollout.py
    python benchmarks/rollout.py --policy runs/a/iteration-001/improve/policy --turns 2 4 8

Prints a line for each number of turns, medians over the repetitions, and, last, one JSON object: `ratio` is seconds of
encoding anew over seconds with the cache, at the most turns; `rows` hold all figures.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from iterative_ppo.config import PolicyConfig
from iterative_ppo.conversations import Conversation
from iterative_ppo.environments.rollout import RolloutStatistics, collect
from iterative_ppo.policy import Policy
from iterative_ppo.sampling import ConversationCache, SampledResponses

WORDS = "i you we shoes trail light budget around eighty please think about the colour size blue red maybe later yes no"


class Chatty(gymnasium.Env[str, str]):
    """A customer who says twelve random words, whatever the seller says, for so many turns."""

    def __init__(self, num_turns: int) -> None:
        self.num_turns = num_turns

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.turn = 0
        return self._words(), {"system": "you sell shoes"}

    def step(self, _: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return self._words(), 0.0, self.turn == self.num_turns, False, {}

    def _words(self) -> str:
        return " ".join(self.np_random.choice(WORDS.split(), 12))


class Forgetful(ConversationCache):
    """Starts anew at every turn."""

    def sample(self, prompts: Sequence[tuple[int, ...]], uniforms_BT: np.ndarray) -> SampledResponses:
        self.keep([])
        return super().sample(prompts, uniforms_BT)


class ForgetfulPolicy(Policy):
    """The same policy without the memory."""

    def conversation_cache(self) -> ConversationCache:
        return Forgetful(
            self.model,
            end_id=self.renderer.end_id,
            temperature=self.temperature,
            max_response_tokens=self.config.max_response_tokens,
        )


def play(policy: Policy, num_turns: int, num_conversations: int, seed: int) -> tuple[list[Conversation], float, int]:
    """The conversations, the seconds that they took and the tokens that the model ran over."""
    counts = RolloutStatistics()
    started = time.perf_counter()
    conversations = list(
        collect(
            policy,
            functools.partial(Chatty, num_turns),
            num_conversations=num_conversations,
            seed=seed,
            max_turns=num_turns,
            lockstep=num_conversations,
            name="rollout",
            statistics=counts,
        )
    )
    return conversations, time.perf_counter() - started, counts.num_encoded_tokens


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policy", default="tiny", help="a hub id or a folder; default: the tiny model, random weights"
    )
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    # A random model seldom ends a response: with a cap of 16 tokens, 32 turns fit into the context.
    config = PolicyConfig(context_tokens=2048, max_response_tokens=16)
    if arguments.policy == "tiny":
        remembering = Policy.tiny([WORDS] * 20, config, seed=0)
    else:
        remembering = Policy.load(arguments.policy, config)
    ways = remembering, ForgetfulPolicy(remembering.model, remembering.tokenizer, config)
    rows = []
    for num_turns in arguments.turns:
        seconds: tuple[list[float], list[float]] = [], []
        encoded = [0, 0]
        for seed in range(arguments.repetitions + 1):
            played = [play(policy, num_turns, arguments.conversations, seed) for policy in ways]
            if [c.messages[-2].content for c in played[0][0]] != [c.messages[-2].content for c in played[1][0]]:
                raise SystemExit(f"the two ways gave different conversations (turns {num_turns}, seed {seed})")
            if seed == 0:
                continue  # warms up
            for way, (_, way_seconds, way_encoded) in enumerate(played):
                seconds[way].append(way_seconds)
                encoded[way] += way_encoded
        medians = [statistics.median(s) for s in seconds]
        num_played = arguments.conversations * arguments.repetitions
        row = {
            "turns": num_turns,
            "encoded_tokens": encoded[0] / num_played,
            "encoded_tokens_anew": encoded[1] / num_played,
            "conversations_per_second": arguments.conversations / medians[0],
            "conversations_per_second_anew": arguments.conversations / medians[1],
            "ratio": statistics.median(anew / kept for kept, anew in zip(*seconds, strict=True)),
        }
        rows.append(row)
        print(
            f"{num_turns} turns: {row['encoded_tokens']:.0f} tokens encoded a conversation "
            f"({row['encoded_tokens'] / num_turns:.0f} a turn) against {row['encoded_tokens_anew']:.0f}; "
            f"{row['conversations_per_second']:.1f} conversations/s against "
            f"{row['conversations_per_second_anew']:.1f}, ratio {row['ratio']:.2f}"
        )
    print(json.dumps({"policy": arguments.policy, "ratio": rows[-1]["ratio"], "rows": rows}))


if __name__ == "__main__":
    main()
