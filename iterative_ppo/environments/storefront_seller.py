"""The mediocre seller of the storefront who writes the first logs.

It does the sensible thing about half the time and each of the others a few times in a hundred, so its logs
cover every act in every situation. It reads only what the customer said, and forgets the kind of shoe and the budget
often enough for the difference to be seen: what a seller never gets wrong, its logs cannot teach.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from iterative_ppo.environments.storefront_customer import NEEDS, TIERS, Act, Meaning, Says
from iterative_ppo.environments.storefront_language import say
from iterative_ppo.environments.storefront_parser import read_reply

HABITS: Mapping[str, Mapping[Act, float]] = {
    "need unknown": {
        Act.ASK_NEED: 0.57,
        Act.ASK_BUDGET: 0.12,
        Act.RECOMMEND: 0.09,
        Act.REASSURE_DURABILITY: 0.03,
        Act.REASSURE_RETURNS: 0.03,
        Act.OFFER_DISCOUNT: 0.07,
        Act.COMPLIMENT: 0.06,
        Act.CLOSE: 0.03,
    },
    "budget unknown": {
        Act.ASK_NEED: 0.04,
        Act.ASK_BUDGET: 0.40,
        Act.RECOMMEND: 0.36,
        Act.REASSURE_DURABILITY: 0.03,
        Act.REASSURE_RETURNS: 0.03,
        Act.OFFER_DISCOUNT: 0.06,
        Act.COMPLIMENT: 0.05,
        Act.CLOSE: 0.03,
    },
    "budget known": {
        Act.ASK_NEED: 0.03,
        Act.ASK_BUDGET: 0.03,
        Act.RECOMMEND: 0.76,
        Act.REASSURE_DURABILITY: 0.03,
        Act.REASSURE_RETURNS: 0.03,
        Act.OFFER_DISCOUNT: 0.05,
        Act.COMPLIMENT: 0.04,
        Act.CLOSE: 0.03,
    },
    "worried about durability": {
        Act.ASK_NEED: 0.03,
        Act.ASK_BUDGET: 0.03,
        Act.RECOMMEND: 0.04,
        Act.REASSURE_DURABILITY: 0.62,
        Act.REASSURE_RETURNS: 0.09,
        Act.OFFER_DISCOUNT: 0.06,
        Act.COMPLIMENT: 0.04,
        Act.CLOSE: 0.09,
    },
    "worried about the fit": {
        Act.ASK_NEED: 0.03,
        Act.ASK_BUDGET: 0.03,
        Act.RECOMMEND: 0.04,
        Act.REASSURE_DURABILITY: 0.09,
        Act.REASSURE_RETURNS: 0.62,
        Act.OFFER_DISCOUNT: 0.06,
        Act.COMPLIMENT: 0.04,
        Act.CLOSE: 0.09,
    },
    "convinced": {
        Act.ASK_NEED: 0.03,
        Act.ASK_BUDGET: 0.03,
        Act.RECOMMEND: 0.04,
        Act.REASSURE_DURABILITY: 0.04,
        Act.REASSURE_RETURNS: 0.04,
        Act.OFFER_DISCOUNT: 0.20,
        Act.COMPLIMENT: 0.03,
        Act.CLOSE: 0.59,
    },
    "convinced, after a question for a deal": {
        Act.ASK_NEED: 0.03,
        Act.ASK_BUDGET: 0.04,
        Act.RECOMMEND: 0.05,
        Act.REASSURE_DURABILITY: 0.05,
        Act.REASSURE_RETURNS: 0.05,
        Act.OFFER_DISCOUNT: 0.40,
        Act.COMPLIMENT: 0.03,
        Act.CLOSE: 0.35,
    },
    "convinced, delighted by a discount": {
        Act.ASK_NEED: 0.04,
        Act.ASK_BUDGET: 0.04,
        Act.RECOMMEND: 0.06,
        Act.REASSURE_DURABILITY: 0.06,
        Act.REASSURE_RETURNS: 0.06,
        Act.OFFER_DISCOUNT: 0.09,
        Act.COMPLIMENT: 0.05,
        Act.CLOSE: 0.60,
    },
}
"""What it does with which probability, by situation."""
KEEPS_NEED_PROBABILITY = 0.68
"""How often a recommendation keeps to a need that the customer stated."""
KEEPS_BUDGET_PROBABILITY = 0.66
"""How often a recommendation keeps to a budget that the customer stated."""


class Notes(NamedTuple):
    """What the seller gathered from the customer's texts, e.g. `Notes("budget unknown", "trail", "")`."""

    situation: str
    need: str
    tier: str


def take_notes(customer_texts: Sequence[str]) -> Notes:
    """Read what the customer said so far."""
    situation, need, tier, wants_deal = "", "", "", False
    for text in customer_texts:
        reply = read_reply(text)
        need = reply.need or need
        match reply.says:
            case Says.OPENS_FOR_DEAL | Says.OPENS_WITH_NEED_FOR_DEAL:
                wants_deal = True
            case Says.TIGHT_BUDGET | Says.TOO_EXPENSIVE:
                tier = "basic"
            case Says.AMPLE_BUDGET | Says.LUKEWARM:
                tier = "premium"
            case Says.WORRY_DURABILITY:
                situation = "worried about durability"
            case Says.WORRY_RETURNS:
                situation = "worried about the fit"
            case Says.CONVINCED:
                situation = "convinced, after a question for a deal" if wants_deal else "convinced"
            case Says.DELIGHTED if situation.startswith("convinced"):
                situation = "convinced, delighted by a discount"
            case _:
                pass
    if not situation:
        situation = "budget known" if need and tier else "budget unknown" if need else "need unknown"
    return Notes(situation, need, tier)


def scripted_response(messages: Sequence[Mapping[str, str]], generator: np.random.Generator) -> str:
    """The scripted seller's next message.

    Args:
        messages: the chat so far, each with `role` and `content`; the customer is the `user`.
        generator: the source of all randomness.
    """
    notes = take_notes([message["content"] for message in messages if message["role"] == "user"])
    habits = HABITS[notes.situation]
    act = list(habits)[generator.choice(len(habits), p=list(habits.values()))]
    if act != Act.RECOMMEND:
        return say(Meaning(act), generator)
    need, tier = NEEDS[generator.integers(len(NEEDS))], TIERS[generator.integers(len(TIERS))]
    if notes.need and generator.random() < KEEPS_NEED_PROBABILITY:
        need = notes.need
    if notes.tier and generator.random() < KEEPS_BUDGET_PROBABILITY:
        tier = notes.tier
    return say(Meaning(act, need, tier), generator)
