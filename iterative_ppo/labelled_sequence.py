"""Decision points with returns, as tokens: what Q is fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from iterative_ppo.batching import marked
from iterative_ppo.q_function import TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSequence:
    """Decision points of one conversation with their returns.

    A span with start == end is a state with no response: the end of a conversation whose last word is the
    customer's. It is trained on, as the outcome seen from there, and is no decision point.

    Example:
        LabelledSequence(token_ids=(1, 8, 9, 2, 5, 9, 2), spans=((2, 4), (5, 7)), turns=(0, 1),
                         returns=(1.0, 1.0), conversation=0, group="c-001", messages_seen=(1, 3), num_messages=4)
    """

    token_ids: TokenIds
    spans: tuple[tuple[int, int], ...]
    turns: tuple[int, ...]
    returns: tuple[float, ...]
    conversation: int
    """Which conversation of the data set this is part of."""
    group: str
    """All sequences of a conversation share it; they fall on one side of every split."""
    messages_seen: tuple[int, ...]
    """Messages (the system's not counted) before each response."""
    num_messages: int
    next_messages: tuple[TokenIds, ...] = ()
    """The customer's answer to each response; empty where there is none. Without any, nothing is learnt from answers."""


def responses(sequences: Sequence[LabelledSequence], width: int) -> Tensor:
    """True at the responses' tokens and at the one before each [B, T], T the width: where a fit reads anything."""
    return marked([[(start - 1, max(start, end)) for start, end in s.spans] for s in sequences], width=width)
