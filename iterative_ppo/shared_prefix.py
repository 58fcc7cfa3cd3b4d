"""Many prompts and responses in one causal pass, every shared token computed once.

The prompts of one conversation are prefixes of each other, and K responses to one prompt share all of it. A *tree* is
the longest prompt of such a family, its trunk, followed by the responses, its branches: a branch sees the part of the
trunk that is its own prompt, and itself (tree attention: Miao et al. 2024, SpecInfer, arXiv 2305.09781).

    prompts  a b   |  a b c d         tokens     a b c d | r s | r s | t u
    responses r s  |  r s, t u        positions  0 1 2 3   2 3   4 5   4 5

Rows are (prompt, response) pairs. R rows, B trees, T tokens of a tree, L tokens of a response.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iterative_ppo.batching import own_micro_batches

TokenIds = tuple[int, ...]

_MIN_BRANCH_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBatch:
    """Rows as padded trees, and where each row's tokens are read.

    Example:
        TreeBatch(token_BT=[[5, 6, 7, 9, 2, 8, 2]], position_BT=[[0, 1, 2, 3, 4, 3, 4]], attention_BTT=..., tree_R=[0, 0],
                  before_RL=[[2, 3], [2, 5]], end_R=[4, 6], response_RL=[[9, 2], [8, 2]], mask_RL=[[1, 1], [1, 1]])
    """

    token_BT: Tensor
    position_BT: Tensor
    attention_BTT: Tensor | None
    """True where a token (row) sees another (column); None where no tree has branches: then all see what comes before."""
    tree_R: Tensor
    """Which tree a row is part of."""
    before_RL: Tensor
    """Column of the token before each response token: where the model predicts it."""
    end_R: Tensor | None
    """Column of the response's last token (the prompt's last, of an empty response); None where it is left out."""
    response_RL: Tensor
    mask_RL: Tensor

    def before(self, x_BT: Tensor) -> Tensor:
        """What stands at the token before each response token [R, L], or [R, L, D] of x [B, T, D]."""
        return _at(x_BT, self._before_places)

    def end(self, x_BT: Tensor) -> Tensor:
        """What stands at each response's last token [R], or [R, D] of x [B, T, D]."""
        return _at(x_BT, self._end_places)

    def at_ends(self) -> Tensor:
        """True at each response's last token [B, T]."""
        return self._marked(self._end_places)

    def at_responses(self) -> Tensor:
        """True before each response token, and at each response's last, where it is computed [B, T]."""
        places = self._before_places[self.mask_RL]
        return self._marked(places if self.end_R is None else torch.cat([places, self._end_places]))

    def _marked(self, place_N: Tensor) -> Tensor:
        marked_BT = torch.zeros(self.token_BT.shape, dtype=torch.bool)
        marked_BT.view(-1)[place_N] = True
        return marked_BT

    @property
    def _before_places(self) -> Tensor:
        """`before_RL`, counted through all trees."""
        return self.tree_R[:, None] * self.token_BT.shape[1] + self.before_RL

    @property
    def _end_places(self) -> Tensor:
        """`end_R`, counted through all trees."""
        assert self.end_R is not None, "the responses' last tokens were left out"
        return self.tree_R * self.token_BT.shape[1] + self.end_R


def _at(x_BT: Tensor, place: Tensor) -> Tensor:
    """x [B, T] or [B, T, D] at places counted through both dimensions.

    Looked up as in a table of embeddings: several rows read one place, and the gradients of that lookup are added up in
    the same order each time, where those of an index are added by threads as they come.
    """
    if x_BT.dim() == 2:
        return _at(x_BT[..., None], place).squeeze(-1)
    return nn.functional.embedding(place.to(x_BT.device), x_BT.flatten(0, 1))


def families(prompts: Sequence[TokenIds], *, max_copies: int | None = None) -> list[list[int]]:
    """Groups the rows whose prompts are prefixes of each other, each group from its shortest prompt to its longest.

    Args:
        max_copies: a group holds so many rows of one and the same prompt, at most; the next one begins another group.
            Where groups are drawn at random, a prompt that begins every conversation must not be drawn all at once.
    """
    groups: list[list[int]] = []
    num_copies = 0  # of the last group's longest prompt
    for row in sorted(range(len(prompts)), key=prompts.__getitem__):
        longest = prompts[groups[-1][-1]] if groups else None
        num_copies = num_copies + 1 if prompts[row] == longest else 1
        is_prefix = longest is not None and prompts[row][: len(longest)] == longest
        if is_prefix and (max_copies is None or num_copies <= max_copies):
            groups[-1].append(row)
        else:
            groups.append([row])
            num_copies = 1
    return groups


def takes_trees(module: nn.Module) -> bool:
    """Whether all models in a module can be told token by token what to attend to.

    They can where every layer attends to all that came before. Sliding windows and recurrent layers know only their
    own order: their rows must stay apart.
    """
    return all(_has_full_attention(model) for model in module.modules() if isinstance(model, PreTrainedModel))


def _has_full_attention(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) is not None
    return kinds == {"full_attention"} and not has_window and config._attn_implementation in ("sdpa", "eager")


def tree_batches(
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    tokens_per_batch: int,
    share: bool = True,
    ends: bool = True,
    in_step: bool = False,
) -> Iterator[tuple[list[int], TreeBatch]]:
    """All rows as batches of trees, each with the rows that it holds, in the order of the batch's R.

    Of several processes each has its share of the trees.

    Args:
        tokens_per_batch: padded tokens of a batch, at most (a larger tree goes alone).
        share: whether rows may share a tree; see `takes_trees`.
        ends: whether the responses' last tokens are computed. What stands before each token does not depend on them.
        in_step: whether every process gets as many batches as the one with the most; what it lacks has no rows of its
            own, and a tree to be computed all the same.
    """
    trees = _trees(prompts, responses) if share else [[row] for row in range(len(prompts))]
    sizes = [len(prompts[tree[-1]]) + sum(_computed(responses[row], ends) for row in tree) for tree in trees]
    for batch in own_micro_batches(sizes, tokens_per_batch=tokens_per_batch, in_step=in_step):
        chosen = [trees[tree] for tree in batch]
        computed = chosen or [trees[sizes.index(min(sizes))]]
        yield [row for tree in chosen for row in tree], _tree_batch(computed, prompts, responses, ends=ends)


def run_trees(call: Callable[..., Tensor], batch: TreeBatch, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`call(input_ids, ...)` of a model on a batch of trees."""
    if batch.attention_BTT is None:
        return call(input_ids=batch.token_BT.to(device))
    allowed_BTT = torch.zeros(batch.attention_BTT.shape, dtype=dtype)
    attention_BTT = allowed_BTT.masked_fill_(~batch.attention_BTT, torch.finfo(dtype).min)
    return call(
        input_ids=batch.token_BT.to(device),
        attention_mask=attention_BTT[:, None].to(device),
        position_ids=batch.position_BT.to(device),
    )


def _trees(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> list[list[int]]:
    """Families, split where their branches would be much longer than the trunk that they share.

    Attention is computed between all tokens of a tree, the pairs that do not see each other included.
    """
    trees: list[list[int]] = []
    for family in families(prompts):
        room = max(len(prompts[family[-1]]), _MIN_BRANCH_TOKENS)
        tree: list[int] = []
        num_branch_tokens = 0
        for row in reversed(family):
            if tree and num_branch_tokens + len(responses[row]) > room:
                trees.append(tree[::-1])
                tree, num_branch_tokens = [], 0
            tree.append(row)
            num_branch_tokens += len(responses[row])
        trees.append(tree[::-1])
    return trees


def _computed(response: TokenIds, ends: bool) -> int:
    """How many of a response's tokens are computed."""
    return len(response) if ends else max(0, len(response) - 1)


def _tree_batch(
    trees: Sequence[Sequence[int]], prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, ends: bool
) -> TreeBatch:
    rows = [row for tree in trees for row in tree]
    width = max(len(prompts[tree[-1]]) + sum(_computed(responses[row], ends) for row in tree) for tree in trees)
    response_width = max(len(responses[row]) for row in rows)
    token_BT, position_BT, visible_BT = (np.zeros((len(trees), width), dtype=np.int64) for _ in range(3))
    branch_BT = np.full((len(trees), width), -1, dtype=np.int64)  # of padding
    before_RL, response_RL = (np.zeros((len(rows), response_width), dtype=np.int64) for _ in range(2))
    mask_RL = np.zeros((len(rows), response_width), dtype=bool)
    tree_R, end_R = (np.zeros(len(rows), dtype=np.int64) for _ in range(2))
    r = 0
    for b, tree in enumerate(trees):
        trunk = prompts[tree[-1]]
        column = len(trunk)
        token_BT[b, :column] = trunk
        position_BT[b, :column] = np.arange(column)
        visible_BT[b, :column] = np.arange(1, column + 1)
        branch_BT[b, :column] = 0
        for branch, row in enumerate(tree, start=1):
            start, length, num_computed = len(prompts[row]), len(responses[row]), _computed(responses[row], ends)
            own = slice(column, column + num_computed)
            token_BT[b, own] = responses[row][:num_computed]
            position_BT[b, own] = np.arange(start, start + num_computed)
            visible_BT[b, own] = start
            branch_BT[b, own] = branch
            tree_R[r] = b
            end_R[r] = column + length - 1 if length else start - 1
            before_RL[r, :length] = np.arange(column - 1, column + length - 1)
            before_RL[r, :1] = start - 1
            response_RL[r, :length] = responses[row]
            mask_RL[r, :length] = True
            column += num_computed
            r += 1
    is_chain = all(len(tree) == 1 for tree in trees)
    return TreeBatch(
        token_BT=torch.from_numpy(token_BT),
        position_BT=torch.from_numpy(position_BT),
        attention_BTT=None if is_chain else _attention(torch.from_numpy(branch_BT), torch.from_numpy(visible_BT)),
        tree_R=torch.from_numpy(tree_R),
        before_RL=torch.from_numpy(before_RL),
        end_R=torch.from_numpy(end_R) if ends else None,
        response_RL=torch.from_numpy(response_RL),
        mask_RL=torch.from_numpy(mask_RL),
    )


def _attention(branch_BT: Tensor, visible_BT: Tensor) -> Tensor:
    """Who sees whom [B, T, T], from each token's branch (0 the trunk, -1 padding) and how much of the trunk it sees."""
    column_T = torch.arange(branch_BT.shape[1])
    in_trunk_BT = branch_BT == 0
    sees_trunk_BTT = in_trunk_BT[:, None, :] & (column_T[None, None, :] < visible_BT[:, :, None])
    is_same_branch_BTT = (branch_BT[:, :, None] == branch_BT[:, None, :]) & ~in_trunk_BT[:, None, :]
    return sees_trunk_BTT | (is_same_branch_BTT & (column_T[None, None, :] <= column_T[None, :, None]))
