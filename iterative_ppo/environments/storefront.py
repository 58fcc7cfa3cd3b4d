"""A simulated shoe shop: sell with a few short messages to a customer whose wishes are hidden."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text

from iterative_ppo.environments import storefront_seller
from iterative_ppo.environments.storefront_customer import (
    EFFECTS,
    Act,
    Customer,
    Meaning,
    Progress,
    Reply,
    Says,
    advance,
    customer_probabilities,
    opening_probabilities,
    reply_probabilities,
)
from iterative_ppo.environments.storefront_language import SYSTEM, reply_text
from iterative_ppo.environments.storefront_optimum import Belief, Seller, Values, openings, replies, values
from iterative_ppo.environments.storefront_parser import MAX_SELLER_CHARACTERS, read_seller

_Drawn = TypeVar("_Drawn", Customer, Reply)
PRINTABLE = frozenset(chr(code) for code in range(32, 127))


class _Exchange(NamedTuple):
    """A message of the seller and its answer, e.g. `_Exchange(Progress(), Meaning(Act.ASK_NEED), Reply(Says.NEEDS, "trail"))`."""

    before: Progress
    meaning: Meaning
    reply: Reply


class Storefront(gymnasium.Env[str, str]):
    """Sell a shoe in a text conversation; the reward is 1 when the customer buys, and 0 before.

    The customer hides a need, a budget, a taste for discounts and a patience. Questions and blunders cost
    patience, and who loses it leaves. What pleases at once (an early discount, a compliment) is not what sells.
    A response may be any text; one that is not understood costs patience.

    `info` has `system` (the seller's instruction) at reset, and `meaning` (the response as understood) and
    `reaction` (the customer's immediate pleasure, in [-1, 1]) at each step: both follow from the texts alone.

    Args:
        max_turns: the conversation is truncated after so many responses.
    """

    def __init__(self, max_turns: int = 10) -> None:
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, not {max_turns}")
        self.max_turns = max_turns
        self.action_space = Text(MAX_SELLER_CHARACTERS, min_length=0, charset=PRINTABLE)
        self.observation_space = Text(120, charset=PRINTABLE)
        self._customer: Customer | None = None
        self._weighed: Belief = ()
        self._unweighed: tuple[_Exchange, ...] = ()
        self._progress = Progress()
        self._on_table: Meaning | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """A new customer comes in and says the first words."""
        super().reset(seed=seed, options=options)
        self._customer = _draw(customer_probabilities(), self.np_random)
        opening = _draw(opening_probabilities(self._customer), self.np_random)
        self._weighed, self._unweighed = openings()[opening].belief, ()
        self._progress = Progress()
        self._on_table = None
        return reply_text(opening, self.np_random), {"system": SYSTEM}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """The customer answers a response.

        Raises:
            ResetNeeded: before the first `reset` and after the end of a conversation.
        """
        if self._customer is None:
            raise ResetNeeded("the conversation has not begun or is over: call reset() first")
        meaning = read_seller(action, self._on_table)
        reply = _draw(reply_probabilities(self._customer, self._progress, meaning), self.np_random)
        self._unweighed += (_Exchange(self._progress, meaning, reply),)
        self._progress = advance(self._progress, reply)
        if meaning.act == Act.RECOMMEND:
            self._on_table = meaning
        terminated = reply.says in (Says.BUYS, Says.LEAVES)
        truncated = not terminated and self._progress.turns >= self.max_turns
        if terminated or truncated:
            self._customer = None
        info = {"meaning": str(meaning), "reaction": EFFECTS[reply.says].reaction}
        reward = 1.0 if reply.says == Says.BUYS else 0.0
        return reply_text(reply, self.np_random), reward, terminated, truncated, info

    def scripted_response(self, messages: Sequence[Mapping[str, str]], generator: np.random.Generator) -> str:
        """The mediocre seller's next message, from the chat alone."""
        return storefront_seller.scripted_response(messages, generator)

    def branch(self, generator: np.random.Generator) -> "Storefront":
        """A copy of the running conversation, for sampling what else may come of it.

        The hidden customer is drawn anew from the exact posterior given all that was said, and the copy's
        randomness comes from `generator`: a mean over branches estimates a true value of the state, as a seller
        knows it.
        """
        other = copy.copy(self)
        other.np_random = generator
        if self._customer is not None:
            other._customer = _draw(dict(self._belief()), generator)
        return other

    def optimum(self) -> float:
        """The exact outcome rate of the best seller, who may use all that was said."""
        return self._values.rate(Seller.OPTIMAL)

    def greedy_reaction_rate(self) -> float:
        """The exact outcome rate of the seller who always says what pleases most at once."""
        return self._values.rate(Seller.GREEDY)

    def uniform_rate(self) -> float:
        """The exact outcome rate of the seller who says any of the meanings with equal probability."""
        return self._values.rate(Seller.UNIFORM)

    def value(self, seller: Seller = Seller.OPTIMAL) -> float:
        """How probably a seller who goes on from here sells: 0 after the end, since what is sold is paid."""
        return 0.0 if self._customer is None else self._values.value(seller, self._belief(), self._progress)

    def best_meaning(self, seller: Seller = Seller.OPTIMAL) -> Meaning:
        """What the optimal or the greedy seller says now; `storefront_language.say` puts it into words."""
        if self._customer is None:
            raise ResetNeeded("the conversation has not begun or is over: call reset() first")
        return self._values.best_meaning(seller, self._belief(), self._progress)

    def _belief(self) -> Belief:
        """The customers that are possible given all that was said; weighed when asked for, since playing needs it not."""
        for exchange in self._unweighed:
            self._weighed = replies(self._weighed, exchange.before, exchange.meaning)[exchange.reply].belief
        self._unweighed = ()
        return self._weighed

    @property
    def _values(self) -> Values:
        return values(self.max_turns)


def _draw(probabilities: Mapping[_Drawn, float], generator: np.random.Generator) -> _Drawn:
    keys = list(probabilities)
    return keys[generator.choice(len(keys), p=list(probabilities.values()))]
