"""Which prompts are sampled together: those that share a prefix, and as many as their keys and values leave room for."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from iterative_ppo import distributed
from iterative_ppo.rendering import TokenIds
from iterative_ppo.sampling import cache_bytes_per_token
from iterative_ppo.shared_prefix import families

_MAX_ROWS = 512
_CACHE_BYTES = 2 << 30
"""Of keys and values on a CPU; on a GPU they may take half of what is free."""


def own_chunks(
    prompts: Sequence[TokenIds], model: PreTrainedModel, *, max_response_tokens: int
) -> Iterator[list[list[int]]]:
    """This process's share of the prompts, by number, as families in chunks of bounded size, the shortest first."""
    rows_of = rows_in_memory(model)
    chunk: list[list[int]] = []
    num_rows = 0
    for whole in sorted(_own_families(prompts), key=lambda family: len(prompts[family[-1]])):
        max_rows = min(_MAX_ROWS, rows_of(len(prompts[whole[-1]]) + max_response_tokens))
        for start in range(0, len(whole), max_rows):
            family = whole[start : start + max_rows]
            if chunk and num_rows + len(family) > max_rows:
                yield chunk
                chunk, num_rows = [], 0
            chunk.append(family)
            num_rows += len(family)
    if chunk:
        yield chunk


def _own_families(prompts: Sequence[TokenIds]) -> list[list[int]]:
    """This process's share of the families of prompts; one that is more than a share is cut."""
    size = math.ceil(len(prompts) / distributed.world_size())
    cut = [family[start : start + size] for family in families(prompts) for start in range(0, len(family), size)]
    return [cut[place] for place in distributed.share_of([len(family) for family in cut])]


def rows_in_memory(model: PreTrainedModel) -> Callable[[int], int]:
    """From a number of tokens to how many rows of so many there is memory for, one at least."""
    num_bytes = _CACHE_BYTES
    if model.device.type == "cuda":
        kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        num_bytes = (torch.cuda.mem_get_info(model.device)[0] + kept) // 2
    max_tokens = num_bytes // cache_bytes_per_token(model)
    return lambda num_tokens: max(1, max_tokens // num_tokens)
