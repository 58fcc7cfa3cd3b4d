"""What a frozen model says of a conversation at each token: its hidden state, means of those before, and whose words they are.

The outcome is the customer's to decide, so what *others than the policy* said has a mean of its own. Whose a token is can
be read off a rendered conversation: the policy's responses stand between the generation prompt and the end token.

B rows or trees, T tokens, D the width, M ensemble members, W words, C tokens of a chunk, P places of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iterative_ppo.shared_prefix import TokenIds, TreeBatch

HALF_LIFE_TOKENS = 64
"""After so many more tokens a token counts half as much in the recent mean."""
RELIABILITY_TOKENS = 400
"""The mean over so many tokens is half what is to be known and half chance."""
_CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseMarks:
    """How a chat template marks the policy's responses.

    Example:
        ResponseMarks(opening=(1, 520, 9531, 198), end_id=2)
    """

    opening: TokenIds
    """The generation prompt, which a response follows. Empty where the template writes none: nobody's words are told apart."""
    end_id: int

    def others(self, token_BT: Tensor, tree: TreeBatch | None = None) -> Tensor:
        """True where a token is not of a response [B, T], on the CPU: the customer's, the system's, the template's own.

        Args:
            tree: the trees whose tokens they are; all of a branch is a response.
        """
        token_BT = token_BT.cpu()
        place_T = torch.arange(token_BT.shape[1])
        opened_BT = torch.full(token_BT.shape, -1)
        width = len(self.opening)
        if 0 < width <= token_BT.shape[1]:
            is_opening_BT = (token_BT.unfold(1, width, 1) == torch.tensor(self.opening)).all(-1)
            opened_BT[:, width - 1 :] = torch.where(is_opening_BT, place_T[width - 1 :], -1)
        ended_BT = torch.where(token_BT == self.end_id, place_T, -1)
        others_BT = torch.ones(token_BT.shape, dtype=torch.bool)
        others_BT[:, 1:] = (opened_BT.cummax(1).values <= ended_BT.cummax(1).values)[:, :-1]
        return others_BT if tree is None else others_BT & (tree.position_BT == place_T)


def num_features(width: int) -> int:
    """Of hidden states of this width."""
    return 4 * width + 3


def features(hidden_BTD: Tensor, others_BT: Tensor, tree: TreeBatch | None = None) -> Tensor:
    """[h ; ρ mean ; ρ recent mean ; ρ' others' mean ; ρ ; ρ' ; 1] at each token [B, T, 4 D + 3].

    The means are over what the token sees, itself included, the others' over what is not of a response. The recent mean
    is Σ_s w_s h_s / Σ_s w_s with w_s = 2^(−age / HALF_LIFE_TOKENS), the age in tokens. With ρ and 1, a head can write
    ρ (weights · (mean − its mean over all logs)).

    Args:
        others_BT: see `ResponseMarks.others`.
        tree: the trees whose hidden states they are. Default: rows, in which a token sees all that stands before it.
    """
    mean_BTD, of_all_BT1 = _reliable_mean(hidden_BTD, torch.ones_like(others_BT), tree)
    others_BTD, of_others_BT1 = _reliable_mean(hidden_BTD, others_BT, tree)
    recent_BTD = of_all_BT1 * _recent_mean(hidden_BTD, tree)
    constant_BT1 = torch.ones_like(of_all_BT1)
    return torch.cat([hidden_BTD, mean_BTD, recent_BTD, others_BTD, of_all_BT1, of_others_BT1, constant_BT1], dim=-1)


def word_scalars(value_BTM: Tensor, others_BT: Tensor, tree: TreeBatch | None = None) -> Tensor:
    """ρ' times the mean of what each of the others' words is worth, at each token [B, T, M].

    Args:
        value_BTM: the worth of each token as a word, to each member.
    """
    mean_BTM, _ = _reliable_mean(value_BTM, others_BT, tree)
    return mean_BTM


def word_shares(row: TokenIds, places: Sequence[int], words: TokenIds, marks: ResponseMarks) -> Tensor:
    """The share of each word among the others' tokens, at places of a row [P, W]: ρ' times them is what `word_scalars` is
    linear in."""
    others_T = marks.others(torch.tensor([row]))[0]
    column_of = {word: column for column, word in enumerate(words)}
    count_TW = torch.zeros(len(row), len(words) + 1)
    count_TW[range(len(row)), [column_of.get(token, len(words)) for token in row]] = others_T.float()
    at = list(places)
    return count_TW.cumsum(0)[at, :-1] / others_T.cumsum(0)[at, None].clamp(min=1)


def reliability(num_tokens: Tensor) -> Tensor:
    """√(n / (n + RELIABILITY_TOKENS)) of a mean of n tokens, 0 of none.

    The correlation between a mean of n observations and what it estimates (Spearman 1910; Brown 1910): the beginning of a
    conversation says less than all of it, and a regression on means must not take the one for the other.
    """
    return (num_tokens / (num_tokens + RELIABILITY_TOKENS)).sqrt()


def _reliable_mean(x_BTD: Tensor, own_BT: Tensor, tree: TreeBatch | None) -> tuple[Tensor, Tensor]:
    """ρ times the mean of x over the marked tokens that each token sees, 0 where it sees none; and ρ [B, T, 1]."""
    own_BT = own_BT.to(x_BTD.device)
    if tree is None or tree.attention_BTT is None:
        num_seen_BT1 = own_BT.cumsum(1)[..., None]
        mean_BTD = ((x_BTD.double() * own_BT[..., None]).cumsum(1) / num_seen_BT1.clamp(min=1)).float()
    else:
        sees_BTT = tree.attention_BTT.to(x_BTD.device) & own_BT[:, None, :]
        num_seen_BT1 = sees_BTT.sum(-1, keepdim=True)
        mean_BTD = sees_BTT.to(x_BTD) @ x_BTD / num_seen_BT1.clamp(min=1)
    reliability_BT1 = reliability(num_seen_BT1.to(x_BTD))
    return reliability_BT1 * mean_BTD, reliability_BT1


def _recent_mean(hidden_BTD: Tensor, tree: TreeBatch | None) -> Tensor:
    if tree is None or tree.attention_BTT is None:
        count_T1 = torch.arange(1, hidden_BTD.shape[1] + 1, device=hidden_BTD.device)[:, None]
        weight_T1 = (1 - _decay(count_T1)) / (1 - _decay(torch.ones_like(count_T1)))
        return _decayed_sums(hidden_BTD) / weight_T1
    position_BT = tree.position_BT.to(hidden_BTD)
    age_BTT = (position_BT[:, :, None] - position_BT[:, None, :]).clamp(min=0)
    weight_BTT = tree.attention_BTT.to(hidden_BTD) * _decay(age_BTT)
    return weight_BTT @ hidden_BTD / weight_BTT.sum(-1, keepdim=True)


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
