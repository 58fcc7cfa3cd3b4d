"""The customer of the storefront: what each side can mean, and how probably the customer answers what.

One table of probabilities, `reply_probabilities`, is sampled by the simulator and summed over by the dynamic
programme (`storefront_optimum`), so the two cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import product
from typing import NamedTuple

NEEDS = ("trail", "road", "court", "casual")
TIERS = ("basic", "premium")


class Act(StrEnum):
    """What a seller can do with one message."""

    ASK_NEED = "ask need"
    ASK_BUDGET = "ask budget"
    RECOMMEND = "recommend"
    REASSURE_DURABILITY = "reassure durability"
    REASSURE_RETURNS = "reassure returns"
    OFFER_DISCOUNT = "offer discount"
    COMPLIMENT = "compliment"
    CLOSE = "close"
    UNCLEAR = "unclear"


class Meaning(NamedTuple):
    """A seller's message as the customer understands it, e.g. `Meaning(Act.RECOMMEND, "trail", "basic")`."""

    act: Act
    need: str = ""
    tier: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.act.value, self.tier, self.need) if part)


UNCLEAR = Meaning(Act.UNCLEAR)
MEANINGS: tuple[Meaning, ...] = (
    Meaning(Act.ASK_NEED),
    Meaning(Act.ASK_BUDGET),
    *(Meaning(Act.RECOMMEND, need, tier) for need in NEEDS for tier in TIERS),
    Meaning(Act.REASSURE_DURABILITY),
    Meaning(Act.REASSURE_RETURNS),
    Meaning(Act.OFFER_DISCOUNT),
    Meaning(Act.COMPLIMENT),
    Meaning(Act.CLOSE),
)
"""Everything that a seller can say and be understood: its actions."""


class Says(StrEnum):
    """What a customer can say."""

    OPENS = "opens"
    OPENS_FOR_DEAL = "opens, asks for a deal"
    OPENS_WITH_NEED = "opens with the need"
    OPENS_WITH_NEED_FOR_DEAL = "opens with the need, asks for a deal"
    NEEDS = "tells the need"
    TIGHT_BUDGET = "tells a tight budget"
    AMPLE_BUDGET = "tells an ample budget"
    WRONG_KIND = "wrong kind of shoe"
    TOO_EXPENSIVE = "too expensive"
    LUKEWARM = "lukewarm"
    WORRY_DURABILITY = "likes it, worries about durability"
    WORRY_RETURNS = "likes it, worries about the fit"
    CONVINCED = "convinced"
    OTHER_WORRY = "has another worry"
    NO_SHOE_YET = "no shoe on the table"
    HEARD_ALREADY = "heard that already"
    DELIGHTED = "delighted by a discount"
    SUSPICIOUS = "suspicious of another discount"
    FLATTERED = "flattered"
    IMPATIENT = "impatient with small talk"
    HESITATES = "hesitates"
    NOT_READY = "not ready to buy"
    CONFUSED = "confused"
    BUYS = "buys"
    LEAVES = "leaves"


class Reply(NamedTuple):
    """A customer's message as anybody understands it, e.g. `Reply(Says.NEEDS, "trail")`."""

    says: Says
    need: str = ""


class Customer(NamedTuple):
    """What the seller cannot see, e.g. `Customer("trail", "tight", True, 5)`."""

    need: str
    budget: str
    likes_discounts: bool
    patience: int
    """The customer leaves when the patience spent reaches this."""


class Interest(StrEnum):
    """How far the customer's interest in a shoe has come."""

    NONE = "none"
    LUKEWARM = "lukewarm"
    WORRIED_DURABILITY = "worried about durability"
    WORRIED_RETURNS = "worried about the fit"
    CONVINCED = "convinced"


class Discount(StrEnum):
    """When the first discount was offered: before (early) or after (late) a recommendation that matched."""

    NONE = "none"
    EARLY = "early"
    LATE = "late"


class Progress(NamedTuple):
    """Where the conversation stands, as anybody who reads it can tell."""

    turns: int = 0
    patience_spent: int = 0
    interest: Interest = Interest.NONE
    discount: Discount = Discount.NONE
    flattered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What goes with a reply, e.g. `Effect(patience=1, reaction=0.6)`."""

    patience: int
    """What the seller's message cost the customer's patience."""
    reaction: float
    """The customer's immediate pleasure, in [-1, 1]."""


EFFECTS: Mapping[Says, Effect] = {
    Says.OPENS: Effect(patience=0, reaction=0.0),
    Says.OPENS_FOR_DEAL: Effect(patience=0, reaction=0.0),
    Says.OPENS_WITH_NEED: Effect(patience=0, reaction=0.0),
    Says.OPENS_WITH_NEED_FOR_DEAL: Effect(patience=0, reaction=0.0),
    Says.NEEDS: Effect(patience=1, reaction=-0.1),
    Says.TIGHT_BUDGET: Effect(patience=1, reaction=-0.1),
    Says.AMPLE_BUDGET: Effect(patience=1, reaction=-0.1),
    Says.WRONG_KIND: Effect(patience=4, reaction=-0.7),
    Says.TOO_EXPENSIVE: Effect(patience=3, reaction=-0.5),
    Says.LUKEWARM: Effect(patience=3, reaction=0.1),
    Says.WORRY_DURABILITY: Effect(patience=0, reaction=0.7),
    Says.WORRY_RETURNS: Effect(patience=0, reaction=0.7),
    Says.CONVINCED: Effect(patience=0, reaction=0.6),
    Says.OTHER_WORRY: Effect(patience=2, reaction=-0.3),
    Says.NO_SHOE_YET: Effect(patience=2, reaction=-0.3),
    Says.HEARD_ALREADY: Effect(patience=1, reaction=-0.2),
    Says.DELIGHTED: Effect(patience=0, reaction=0.9),
    Says.SUSPICIOUS: Effect(patience=2, reaction=-0.4),
    Says.FLATTERED: Effect(patience=1, reaction=0.8),
    Says.IMPATIENT: Effect(patience=2, reaction=-0.4),
    Says.HESITATES: Effect(patience=2, reaction=-0.2),
    Says.NOT_READY: Effect(patience=2, reaction=-0.4),
    Says.CONFUSED: Effect(patience=2, reaction=-0.5),
    Says.BUYS: Effect(patience=0, reaction=1.0),
    Says.LEAVES: Effect(patience=0, reaction=-0.8),
}

PATIENCE_PROBABILITIES = {4: 0.3, 5: 0.3, 7: 0.4}
STATES_NEED_PROBABILITY = 0.5
DEAL_CUE_PROBABILITIES = {True: 0.75, False: 0.05}
"""How often an opening asks for a deal, by whether the customer likes discounts."""
SALE_PROBABILITIES = {
    Interest.NONE: 0.0,
    Interest.LUKEWARM: 0.2,
    Interest.WORRIED_DURABILITY: 0.2,
    Interest.WORRIED_RETURNS: 0.2,
    Interest.CONVINCED: 0.95,
}
DISCOUNT_FACTORS = {
    Discount.NONE: {True: 0.5, False: 1.0},
    Discount.EARLY: {True: 0.15, False: 0.15},
    Discount.LATE: {True: 1.0, False: 0.85},
}
"""What becomes of the sale probability, by whether the customer likes discounts."""
LEAVES_UNSOLD_PROBABILITY = 0.7
"""How often a customer who does not buy at a close leaves at once."""


@cache
def customer_probabilities() -> Mapping[Customer, float]:
    """Every hidden customer with its probability: need, budget and taste are even, patience is as tabled."""
    types = product(NEEDS, ("tight", "ample"), (True, False), PATIENCE_PROBABILITIES)
    return {
        Customer(need, budget, likes, patience): PATIENCE_PROBABILITIES[patience] / (len(NEEDS) * 2 * 2)
        for need, budget, likes, patience in types
    }


def opening_probabilities(customer: Customer) -> Mapping[Reply, float]:
    """The first message: it states the need or not, it asks for a deal or not."""
    deal = DEAL_CUE_PROBABILITIES[customer.likes_discounts]
    stated, silent = STATES_NEED_PROBABILITY, 1 - STATES_NEED_PROBABILITY
    return {
        Reply(Says.OPENS_WITH_NEED_FOR_DEAL, customer.need): stated * deal,
        Reply(Says.OPENS_WITH_NEED, customer.need): stated * (1 - deal),
        Reply(Says.OPENS_FOR_DEAL): silent * deal,
        Reply(Says.OPENS): silent * (1 - deal),
    }


def sale_probability(customer: Customer, progress: Progress) -> float:
    """How probably a close sells now."""
    return SALE_PROBABILITIES[progress.interest] * DISCOUNT_FACTORS[progress.discount][customer.likes_discounts]


def _answer_to_recommendation(customer: Customer, progress: Progress, meaning: Meaning) -> dict[Says, float]:
    if meaning.need != customer.need:
        return {Says.WRONG_KIND: 1.0}
    if meaning.tier == "premium" and customer.budget == "tight":
        return {Says.TOO_EXPENSIVE: 1.0}
    if meaning.tier == "basic" and customer.budget == "ample":
        return {Says.LUKEWARM: 1.0}
    if progress.interest in (Interest.NONE, Interest.LUKEWARM):
        return {Says.WORRY_DURABILITY: 0.5, Says.WORRY_RETURNS: 0.5}
    return {Says.HEARD_ALREADY: 1.0}


def _answer_to_reassurance(progress: Progress, settles: Interest) -> dict[Says, float]:
    match progress.interest:
        case Interest.NONE:
            return {Says.NO_SHOE_YET: 1.0}
        case Interest.CONVINCED:
            return {Says.HEARD_ALREADY: 1.0}
        case worry:
            return {Says.CONVINCED if worry == settles else Says.OTHER_WORRY: 1.0}


def _answer_to_close(customer: Customer, progress: Progress) -> dict[Says, float]:
    if progress.interest == Interest.NONE:
        return {Says.NOT_READY: 1.0}
    sale = sale_probability(customer, progress)
    leaves = (1 - sale) * LEAVES_UNSOLD_PROBABILITY
    return {Says.BUYS: sale, Says.HESITATES: 1 - sale - leaves, Says.LEAVES: leaves}


def _answer(customer: Customer, progress: Progress, meaning: Meaning) -> dict[Says, float]:
    match meaning.act:
        case Act.ASK_NEED:
            return {Says.NEEDS: 1.0}
        case Act.ASK_BUDGET:
            return {Says.TIGHT_BUDGET if customer.budget == "tight" else Says.AMPLE_BUDGET: 1.0}
        case Act.RECOMMEND:
            return _answer_to_recommendation(customer, progress, meaning)
        case Act.REASSURE_DURABILITY:
            return _answer_to_reassurance(progress, settles=Interest.WORRIED_DURABILITY)
        case Act.REASSURE_RETURNS:
            return _answer_to_reassurance(progress, settles=Interest.WORRIED_RETURNS)
        case Act.OFFER_DISCOUNT:
            return {Says.DELIGHTED if progress.discount == Discount.NONE else Says.SUSPICIOUS: 1.0}
        case Act.COMPLIMENT:
            return {Says.IMPATIENT if progress.flattered else Says.FLATTERED: 1.0}
        case Act.CLOSE:
            return _answer_to_close(customer, progress)
        case Act.UNCLEAR:
            return {Says.CONFUSED: 1.0}


def reply_probabilities(customer: Customer, progress: Progress, meaning: Meaning) -> Mapping[Reply, float]:
    """How probably this customer answers what; whose patience an answer uses up says goodbye instead."""
    probabilities: dict[Reply, float] = {}
    for says, probability in _answer(customer, progress, meaning).items():
        exhausted = progress.patience_spent + EFFECTS[says].patience >= customer.patience
        said = Says.LEAVES if exhausted and says != Says.BUYS else says
        reply = Reply(said, customer.need if said == Says.NEEDS else "")
        probabilities[reply] = probabilities.get(reply, 0.0) + probability
    return probabilities


def advance(progress: Progress, reply: Reply) -> Progress:
    """Where the conversation stands after the reply: a function of what was said, never of the customer."""
    interest, discount = progress.interest, progress.discount
    match reply.says:
        case Says.LUKEWARM if interest == Interest.NONE:
            interest = Interest.LUKEWARM
        case Says.WORRY_DURABILITY:
            interest = Interest.WORRIED_DURABILITY
        case Says.WORRY_RETURNS:
            interest = Interest.WORRIED_RETURNS
        case Says.CONVINCED:
            interest = Interest.CONVINCED
        case Says.DELIGHTED:
            early = interest in (Interest.NONE, Interest.LUKEWARM)
            discount = Discount.EARLY if early else Discount.LATE
        case _:
            pass
    return Progress(
        turns=progress.turns + 1,
        patience_spent=progress.patience_spent + EFFECTS[reply.says].patience,
        interest=interest,
        discount=discount,
        flattered=progress.flattered or reply.says == Says.FLATTERED,
    )
