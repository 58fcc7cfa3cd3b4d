"""Means of hidden states over what a token sees, over all of it and over what is recent, and how far to trust them.

B rows or trees, T tokens, D the width, C tokens of a chunk.
"""

import torch
from torch import Tensor

from iterative_ppo.shared_prefix import TreeBatch

HALF_LIFE_TOKENS = 64
"""After so many more tokens a token counts half as much in the recent mean."""
RELIABILITY_TOKENS = 400
"""The mean over so many tokens is half what is to be known and half chance."""
_CHUNK_TOKENS = 256


def running_means(hidden_BTD: Tensor, tree: TreeBatch | None = None) -> tuple[Tensor, Tensor]:
    """The mean of hidden states over all tokens that each token sees, itself included, and their recent mean.

    The recent mean is Σ_s w_s h_s / Σ_s w_s with w_s = 2^(−age / HALF_LIFE_TOKENS), the age in tokens.

    Args:
        tree: the trees whose hidden states they are, where a token does not see all that stands before it.
    """
    if tree is None or tree.attention_BTT is None:
        return _means_of_rows(hidden_BTD)
    position_BT = tree.position_BT.to(hidden_BTD)
    sees_BTT = tree.attention_BTT.to(hidden_BTD)
    weight_BTT = sees_BTT * _decay((position_BT[:, :, None] - position_BT[:, None, :]).clamp(min=0))
    mean_BTD, recent_BTD = (
        share_BTT @ hidden_BTD / share_BTT.sum(-1, keepdim=True) for share_BTT in (sees_BTT, weight_BTT)
    )
    return mean_BTD, recent_BTD


def reliability(hidden_BTD: Tensor, tree: TreeBatch | None = None) -> Tensor:
    """√(n / (n + RELIABILITY_TOKENS)) at each token [B, T, 1], n being how many tokens it sees, itself included.

    The correlation between a mean of n observations and what it estimates (Spearman 1910; Brown 1910): the beginning of a
    conversation says less than all of it, and a regression on means must not take the one for the other.
    """
    if tree is None:
        num_seen = torch.arange(1, hidden_BTD.shape[1] + 1, device=hidden_BTD.device)[None].expand(len(hidden_BTD), -1)
    else:
        num_seen = tree.position_BT.to(hidden_BTD.device) + 1
    return (num_seen / (num_seen + RELIABILITY_TOKENS)).sqrt()[..., None].to(hidden_BTD.dtype)


def _means_of_rows(hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    count_T1 = torch.arange(1, hidden_BTD.shape[1] + 1, device=hidden_BTD.device)[:, None]
    mean_BTD = (hidden_BTD.double().cumsum(1) / count_T1).float()
    weight_T1 = (1 - _decay(count_T1)) / (1 - _decay(torch.ones_like(count_T1)))
    return mean_BTD, _decayed_sums(hidden_BTD) / weight_T1


def _decayed_sums(hidden_BTD: Tensor) -> Tensor:
    """Σ_s 2^(−age / HALF_LIFE_TOKENS) h_s over all tokens up to each, chunk by chunk."""
    place_C = torch.arange(_CHUNK_TOKENS, device=hidden_BTD.device)
    age_CC = place_C[:, None] - place_C
    decay_CC = _decay(age_CC.clamp(min=0)).tril()
    of_past_C1 = _decay(place_C + 1)[:, None]
    past_B1D = torch.zeros_like(hidden_BTD[:, :1])
    sums = []
    for chunk_BCD in hidden_BTD.split(_CHUNK_TOKENS, dim=1):
        length = chunk_BCD.shape[1]
        sums.append(decay_CC[:length, :length] @ chunk_BCD + of_past_C1[:length] * past_B1D)
        past_B1D = sums[-1][:, -1:]
    return torch.cat(sums, dim=1)


def _decay(age: Tensor) -> Tensor:
    return torch.pow(0.5, age.float() / HALF_LIFE_TOKENS)
