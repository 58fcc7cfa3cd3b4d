"""Forgiving readers of both sides' texts in the storefront.

Both look for key words, whatever the order, case, punctuation and small typos. A *cue* is a set of key words
that must all occur; a meaning is recognised by any of its cues. A key word of four letters or more stands for
every word that begins with it.
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache

from iterative_ppo.environments.storefront_customer import NEEDS, UNCLEAR, Act, Meaning, Reply, Says
from iterative_ppo.environments.storefront_language import CUSTOMER_PHRASES, SELLER_PHRASES

MAX_SELLER_WORDS = 30
MAX_SELLER_CHARACTERS = 240
"""A longer message is not read: it is unclear."""

Cues = tuple[tuple[str, ...], ...]


def _cues(text: str) -> Cues:
    return tuple(tuple(cue.split("+")) for cue in text.split(", "))


SELLER_CUES: Mapping[Act, Cues] = {
    Act.REASSURE_RETURNS: _cues(
        "return, exchange, refund, swap, money+back, send+back, bring+back, not+fit, wrong+size, "
        "another+size, other+size, different+size, change+size"
    ),
    Act.REASSURE_DURABILITY: _cues(
        "durable, durability, warrant, guarantee, sturdy, robust, strong, tough, lasts, lasting, built+last, will+last, "
        "last+years, last+long, wear+out, not+break, never+break, hold+up"
    ),
    Act.OFFER_DISCOUNT: _cues(
        "discount, coupon, voucher, rebate, promo, reduce, deal, percent+off, ten+percent, lower+price, "
        "price+down, price+off, drop+price, special+price, special+offer, on+sale, make+cheaper"
    ),
    Act.CLOSE: _cues(
        "order, buy, purchas, checkout, check+out, ring+up, pack, wrap, take+it, take+them, cart, payment"
    ),
    Act.ASK_BUDGET: _cues(
        "budget, spend, afford, price+range, price+limit, price+mind, how+much, can+pay, want+pay, like+pay, "
        "willing+pay"
    ),
    Act.ASK_NEED: _cues(
        "kind, type, sort, sport, activit, purpose, occasion, looking+for, what+for, which+for, use+for, "
        "use+them, where+wear, where+run, when+wear, what+need, which+need, do+you+need, what+want, "
        "which+shoe, what+shoe, can+help, how+help"
    ),
    Act.COMPLIMENT: _cues(
        "taste, style, lovely, pleasure, smart, wonderful, awesome, weather, welcome, thank, hi, hey, hello, "
        "nice+talk, nice+meet, nice+day, great+choice, good+choice, great+day, how+are+you"
    ),
}

CUSTOMER_CUES: Mapping[Says, Cues] = {
    Says.LEAVES: _cues("bye, goodbye"),
    Says.SUSPICIOUS: _cues("another+discount, price+again, deal+again, another+deal, still+cheaper, strange"),
    Says.OTHER_WORRY: _cues("not+worry, another+worry, not+answer, not+ask, doubt+another, doubt+one"),
    Says.WORRY_DURABILITY: _cues("but+last, but+strong, but+break, but+durable, but+wear"),
    Says.WORRY_RETURNS: _cues("but+fit, but+size, but+return"),
    Says.LUKEWARM: _cues("plain, simple, better"),
    Says.WRONG_KIND: _cues("wrong+kind, wrong+type, not+kind, another+kind, not+type, another+type"),
    Says.TOO_EXPENSIVE: _cues("expensive, not+pay, too+much, too+high"),
    Says.TIGHT_BUDGET: _cues("budget+small, not+spend, cheap, not+more, only+70"),
    Says.AMPLE_BUDGET: _cues("budget+big, spend+lot, price+problem, 150, price+fine"),
    Says.NOT_READY: _cues("too+fast, too+early, slow+down, not+ready"),
    Says.BUYS: _cues("take+it, will+buy, ring+up, place+order"),
    Says.NO_SHOE_YET: _cues("which+shoe, what+shoe, no+shoe, not+show"),
    Says.DELIGHTED: _cues("how+great, love+deal, lower+price, like+save, nice+discount"),
    Says.FLATTERED: _cues("kind, thank, sweet, friendly"),
    Says.IMPATIENT: _cues("get+to+point, enough+talk, small+talk, no+time"),
    Says.HEARD_ALREADY: _cues("already, before, repeat"),
    Says.HESITATES: _cues("not+sure, think, hesitat, maybe"),
    Says.CONVINCED: _cues("settle, no+doubts, good+know, answers, feel+sure"),
    Says.CONFUSED: _cues("sorry, pardon, not+get, sense"),
}
"""In the order of trial; openings and needs are told by a greeting and by the name of a need."""

RECOMMENDING = _cues("recommend, suggest, try, pick, suit, ideal, perfect, about, look, like, choose, go, show, prefer")
NEED_CUES: Mapping[str, Cues] = {need: _cues(need) for need in NEEDS}
TIER_CUES: Mapping[str, Cues] = {
    "basic": _cues("basic, simple, standard, entry, cheap"),
    "premium": _cues("premium, deluxe, luxur"),
}
MODEL = _cues("one, model, version, shoe, pair")
GREETING = _cues("hi, hello, hey")
DEAL = _cues("deal, discount")
ALL_CUES = (
    *SELLER_CUES.values(),
    *CUSTOMER_CUES.values(),
    RECOMMENDING,
    *TIER_CUES.values(),
    *NEED_CUES.values(),
)
KEY_WORDS = frozenset(word for cues in ALL_CUES for cue in cues for word in cue)
ALL_PHRASES = (phrase for table in (SELLER_PHRASES, CUSTOMER_PHRASES) for p in table.values() for phrase in p)
KNOWN_WORDS = frozenset(word for phrase in ALL_PHRASES for word in re.findall("[a-z]+", phrase))


def _stands_for(key_word: str, word: str) -> bool:
    return word == key_word or (len(key_word) >= 4 and word.startswith(key_word))


@lru_cache(maxsize=65536)
def _corrected(word: str) -> str:
    """The key word that an unknown word misspells, or the word itself; the first letter is trusted."""
    if len(word) < 4 or word in KNOWN_WORDS or any(_stands_for(key_word, word) for key_word in KEY_WORDS):
        return word
    candidates = sorted(key_word for key_word in KEY_WORDS if len(key_word) >= 5 and key_word[0] == word[0])
    closest = difflib.get_close_matches(word, candidates, n=1, cutoff=0.8)
    return closest[0] if closest else word


def read_words(text: str) -> tuple[str, ...]:
    """The words of a text: lower case, plain letters and digits, typos in key words corrected."""
    plain = unicodedata.normalize("NFKD", text).replace("\u2019", "'").lower().replace("n't", " not")
    plain = plain.replace("cannot", "can not").replace("%", " percent ")
    return tuple(_corrected(word) for word in re.findall("[a-z]+|[0-9]+", plain.encode("ascii", "ignore").decode()))


def _recognised(cues: Cues, words: tuple[str, ...]) -> bool:
    return any(all(any(_stands_for(key, word) for word in words) for key in cue) for cue in cues)


def _named(cues_by_name: Mapping[str, Cues], words: tuple[str, ...]) -> list[str]:
    return [name for name, cues in cues_by_name.items() if _recognised(cues, words)]


def _recommendation(
    words: tuple[str, ...], needs: list[str], tiers: list[str], on_table: Meaning | None
) -> Meaning | None:
    """The shoe that the words recommend; by default the basic tier, and the need of the shoe on the table."""
    recommends = _recognised(RECOMMENDING, words)
    match needs, tiers:
        case [need], [tier]:
            return Meaning(Act.RECOMMEND, need, tier)
        case [need], [] if recommends:
            return Meaning(Act.RECOMMEND, need, "basic")
        case [], [tier] if recommends and on_table and _recognised(MODEL, words):
            return Meaning(Act.RECOMMEND, on_table.need, tier)
        case _:
            return None


def read_seller(text: str, on_table: Meaning | None = None) -> Meaning:
    """What the customer understands.

    The order of priority is: recommend, reassure (returns, durability), discount, close, ask budget, ask need,
    compliment. A message of two meanings is answered on the first in this order, the other is passed over.
    Naming the shoe that is on the table already is no recommendation where anything else is said, nor is naming
    a need without a tier in a question for the need. More than two meanings beside courtesies, two shoes at once
    or too long a message are unclear, so nobody wins by saying everything.

    Args:
        text: any text.
        on_table: the last recommendation of the conversation.
    """
    return _read_seller(text, on_table) if len(text) <= MAX_SELLER_CHARACTERS else UNCLEAR


@lru_cache(maxsize=65536)
def _read_seller(text: str, on_table: Meaning | None) -> Meaning:
    words = read_words(text)
    needs, tiers = _named(NEED_CUES, words), _named(TIER_CUES, words)
    if len(words) > MAX_SELLER_WORDS or len(tiers) > 1 or (tiers and len(needs) > 1):
        return UNCLEAR
    meanings = [Meaning(act) for act, cues in SELLER_CUES.items() if _recognised(cues, words)]
    shoe = _recommendation(words, needs, tiers, on_table)
    is_mention = bool(meanings) and shoe == on_table
    is_question = not tiers and Meaning(Act.ASK_NEED) in meanings
    if shoe and not is_mention and not is_question:
        meanings.insert(0, shoe)
    if len(needs) > 1 and not meanings:
        meanings.append(Meaning(Act.ASK_NEED))
    num_serious = sum(meaning.act != Act.COMPLIMENT for meaning in meanings)
    return meanings[0] if meanings and num_serious <= 2 else UNCLEAR


@lru_cache(maxsize=4096)
def read_reply(text: str) -> Reply:
    """What a customer's text means, by its key words; what is not recognised reads as confused."""
    words = read_words(text)
    needs = _named(NEED_CUES, words)
    need = needs[0] if needs else ""
    if _recognised(GREETING, words):
        match bool(need), _recognised(DEAL, words):
            case True, True:
                return Reply(Says.OPENS_WITH_NEED_FOR_DEAL, need)
            case True, False:
                return Reply(Says.OPENS_WITH_NEED, need)
            case False, True:
                return Reply(Says.OPENS_FOR_DEAL)
            case _:
                return Reply(Says.OPENS)
    if need:
        return Reply(Says.NEEDS, need)
    return next(
        (Reply(says) for says, cues in CUSTOMER_CUES.items() if _recognised(cues, words)),
        Reply(Says.CONFUSED),
    )
