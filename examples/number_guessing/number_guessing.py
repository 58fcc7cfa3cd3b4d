"""A game to plug in: guess a number from 1 to 32; every guess costs a point, and the answer is higher, lower or yes."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Text

PRINTABLE = frozenset(chr(code) for code in range(32, 127))


class NumberGuessing(gymnasium.Env[str, str]):
    """Reward -1 a guess. Halving the range needs five guesses at most; the scripted player guesses blindly in range.

    Args:
        size: numbers from 1 to this.
        max_guesses: the game is cut after so many.
    """

    def __init__(self, size: int = 32, max_guesses: int = 12) -> None:
        self.size, self.max_guesses = size, max_guesses
        self.action_space = Text(100, min_length=0, charset=PRINTABLE)
        self.observation_space = Text(100, charset=PRINTABLE)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.number = int(self.np_random.integers(1, self.size + 1))
        self.num_guesses = 0
        return "guess my number", {"system": f"numbers from 1 to {self.size}"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.num_guesses += 1
        digits = "".join(character for character in action if character.isdigit())
        guess = int(digits[:6]) if digits else None
        if guess is None:
            reply = "that is no number"
        elif guess == self.number:
            reply = "yes"
        else:
            reply = "higher" if guess < self.number else "lower"
        return reply, -1.0, guess == self.number, self.num_guesses >= self.max_guesses, {}

    def optimum(self) -> float:
        """Minus the guesses that halving needs, averaged over the numbers."""
        guesses = [0.0]  # expected number of them, by how many numbers are left
        for n in range(1, self.size + 1):
            left, right = (n - 1) // 2, n // 2
            guesses.append(1 + (left * guesses[left] + right * guesses[right]) / n)
        return -guesses[self.size]

    def scripted_response(self, messages: Sequence[Mapping[str, str]], generator: np.random.Generator) -> str:
        """A guess drawn evenly from the numbers that the answers so far leave."""
        low, high = 1, self.size
        guess = 0
        for message in messages:
            if message["role"] == "assistant":
                guess = int(message["content"])
            elif message["content"] == "higher":
                low = max(low, guess + 1)
            elif message["content"] == "lower":
                high = min(high, guess - 1)
        return str(generator.integers(low, high + 1))
