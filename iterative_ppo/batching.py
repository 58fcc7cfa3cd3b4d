"""Sequences of different lengths as padded batches of bounded size."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def micro_batches(lengths: Sequence[int], *, tokens_per_batch: int) -> list[list[int]]:
    """Splits rows into batches whose padded size stays within a number of tokens (a longer row goes alone).

    Rows are sorted by length first and share a batch with none less than half as long, so that little is padded.
    Returns the row indices of each batch.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if (
            batches
            and lengths[row] * (len(batches[-1]) + 1) <= tokens_per_batch
            and lengths[row] <= 2 * lengths[batches[-1][0]]
        ):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


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
