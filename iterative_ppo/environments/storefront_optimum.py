"""What a seller of the storefront can reach: exact values by dynamic programming over what a seller can know.

A seller knows the conversation's progress and a belief: the probabilities of the hidden customers, given all
that was said. A paraphrase is drawn independently of the customer given its meaning, so meanings are all that
counts. The recursion over beliefs with Bayes' rule (Smallwood and Sondik, 1973) is exact here because few beliefs
can be reached.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from iterative_ppo.environments.storefront_customer import (
    EFFECTS,
    MEANINGS,
    NEEDS,
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

Belief = tuple[tuple[Customer, float], ...]
"""The customers that are still possible, in a fixed order, with probabilities that add up to one."""


class Seller(StrEnum):
    """The sellers whose values are known exactly."""

    OPTIMAL = "optimal"
    GREEDY = "greedy by immediate reaction"
    UNIFORM = "uniformly random"


class Branch(NamedTuple):
    """One reply that may come, with its probability and the belief after it."""

    probability: float
    belief: Belief


def update(
    prior: Mapping[Customer, float], likelihood: Callable[[Customer], Mapping[Reply, float]]
) -> dict[Reply, Branch]:
    """Bayes' rule for every reply that may come."""
    joint: dict[Reply, dict[Customer, float]] = {}
    for customer, weight in prior.items():
        for reply, probability in likelihood(customer).items():
            if probability > 0:
                joint.setdefault(reply, {})[customer] = weight * probability
    branches = {}
    for reply, weights in joint.items():
        total = sum(weights.values())
        # Rounded, so that beliefs reached by several ways are met again in the tables of values.
        belief = tuple((customer, round(weight / total, 12)) for customer, weight in weights.items())
        branches[reply] = Branch(total, belief)
    return branches


@cache
def openings() -> Mapping[Reply, Branch]:
    """Every opening message, with its probability and the belief after it."""
    return update(customer_probabilities(), opening_probabilities)


def replies(belief: Belief, progress: Progress, meaning: Meaning) -> dict[Reply, Branch]:
    """Every reply that may come to this meaning, with its probability and the belief after it."""
    return update(dict(belief), lambda customer: reply_probabilities(customer, progress, meaning))


def canonical(belief: Belief) -> Belief:
    """The belief with its needs renamed, the most probable first: in the dynamics all needs are alike."""
    weights = dict.fromkeys(NEEDS, 0.0)
    for customer, probability in belief:
        weights[customer.need] += probability
    order = sorted(NEEDS, key=lambda need: -round(weights[need], 9))
    renamed = dict(zip(order, NEEDS, strict=True))
    return tuple(sorted((customer._replace(need=renamed[customer.need]), p) for customer, p in belief))


class Values:
    """Exact probabilities of a sale for one cap on the seller's turns; every value is computed once."""

    def __init__(self, max_turns: int) -> None:
        self.max_turns = max_turns
        self._values: dict[tuple[Seller, Progress, Belief], float] = {}
        self._best_meanings: dict[tuple[Seller, Progress, Belief], Meaning] = {}

    def rate(self, seller: Seller) -> float:
        """The seller's outcome rate over whole conversations."""
        branches = openings().values()
        return sum(branch.probability * self.value(seller, branch.belief, Progress()) for branch in branches)

    def value(self, seller: Seller, belief: Belief, progress: Progress) -> float:
        """How probably this seller sells from here on."""
        if progress.turns >= self.max_turns:
            return 0.0
        belief = canonical(belief)
        key = (seller, progress, belief)
        if key not in self._values:
            match seller:
                case Seller.UNIFORM:
                    options = [self.q_value(seller, belief, progress, meaning) for meaning in MEANINGS]
                    self._values[key] = sum(options) / len(options)
                case Seller.OPTIMAL:
                    self._values[key] = max(self.q_value(seller, belief, progress, meaning) for meaning in MEANINGS)
                case Seller.GREEDY:
                    meaning = self.best_meaning(seller, belief, progress)
                    self._values[key] = self.q_value(seller, belief, progress, meaning)
        return self._values[key]

    def q_value(self, seller: Seller, belief: Belief, progress: Progress, meaning: Meaning) -> float:
        """How probably `meaning` now and this seller from then on sell."""
        total = 0.0
        for reply, branch in replies(belief, progress, meaning).items():
            if reply.says == Says.BUYS:
                total += branch.probability
            elif reply.says != Says.LEAVES:
                total += branch.probability * self.value(seller, branch.belief, advance(progress, reply))
        return total

    def best_meaning(self, seller: Seller, belief: Belief, progress: Progress) -> Meaning:
        """What this seller says now; of equals (up to 1e-9) the first in `MEANINGS`."""
        key = (seller, progress, belief)
        if key not in self._best_meanings:
            match seller:
                case Seller.OPTIMAL:
                    worth = [self.q_value(seller, belief, progress, meaning) for meaning in MEANINGS]
                case Seller.GREEDY:
                    worth = [expected_reaction(belief, progress, meaning) for meaning in MEANINGS]
                case Seller.UNIFORM:
                    raise ValueError("a uniformly random seller has no best meaning")
            best = max(worth)
            self._best_meanings[key] = next(
                meaning for meaning, value in zip(MEANINGS, worth, strict=True) if value >= best - 1e-9
            )
        return self._best_meanings[key]


def expected_reaction(belief: Belief, progress: Progress, meaning: Meaning) -> float:
    """The customer's expected immediate pleasure at this meaning."""
    branches = replies(belief, progress, meaning).items()
    return sum(branch.probability * EFFECTS[reply.says].reaction for reply, branch in branches)


@cache
def values(max_turns: int) -> Values:
    """The table of values for one turn cap, shared by all simulators of this process."""
    return Values(max_turns)
