"""Sequences of different lengths as padded batches of bounded size."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from iterative_ppo import distributed

_PADDED_PER_TOKEN = 1.5


def micro_batches(lengths: Sequence[int], *, tokens_per_batch: int) -> list[list[int]]:
    """Splits rows into batches whose padded size stays within a number of tokens (a longer row goes alone).

    Rows are sorted by length first, and at most a third of a batch is padding: a batch has a cost of its own too, and
    for small models that is more than the padding's. Returns the row indices of each batch.
    """
    batches: list[list[int]] = []
    num_tokens = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = lengths[row] * (len(batches[-1]) + 1) if batches else 0
        if batches and padded <= tokens_per_batch and padded <= _PADDED_PER_TOKEN * (num_tokens + lengths[row]):
            batches[-1].append(row)
            num_tokens += lengths[row]
        else:
            batches.append([row])
            num_tokens = lengths[row]
    return batches


def own_micro_batches(lengths: Sequence[int], *, tokens_per_batch: int, in_step: bool = False) -> list[list[int]]:
    """The same of this process's share of the rows: of all rows, where there are no other processes.

    Args:
        in_step: whether every process gets as many batches as the one with the most; what it lacks is empty.
    """
    shares = distributed.shares(lengths)

    def batches_of(share: list[int]) -> list[list[int]]:
        batches = micro_batches([lengths[row] for row in share], tokens_per_batch=tokens_per_batch)
        return [[share[place] for place in batch] for batch in batches]

    own = batches_of(shares[distributed.rank()])
    most = max(len(batches_of(share)) for share in shares) if in_step else len(own)
    return own + [[] for _ in range(most - len(own))]


def pad_right(rows: Sequence[Sequence[int]], *, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token rows as (token_BT, mask_BT) with the padding behind."""
    width = max(map(len, rows))
    token_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask_BT = np.zeros((len(rows), width), dtype=bool)
    for b, row in enumerate(rows):
        token_BT[b, : len(row)] = row
        mask_BT[b, : len(row)] = True
    return torch.from_numpy(token_BT), torch.from_numpy(mask_BT)


def pad_values(rows: Sequence[Sequence[float] | np.ndarray], *, width: int) -> Tensor:
    """Rows of numbers as float32 [B, width], zeros behind."""
    padded = np.zeros((len(rows), width), dtype=np.float32)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return torch.from_numpy(padded)


def marked(spans: Sequence[Iterable[tuple[int, int]]], *, width: int) -> Tensor:
    """True at the positions within each row's spans (start, end) [B, width]."""
    marked_BT = torch.zeros(len(spans), width, dtype=torch.bool)
    for b, row in enumerate(spans):
        for start, end in row:
            marked_BT[b, start:end] = True
    return marked_BT
