"""Muon for the many small matrices of a small model: matrices of one shape take their step together.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale is that of Liu et al. 2025, arXiv 2502.16982.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_NEWTON_SCHULZ_STEPS = 5
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ADAMW_SIZE = 0.2
"""Root mean square of an AdamW step's entries, in learning rates, to which Muon's steps are scaled."""


class Muon(torch.optim.Optimizer):
    """The steps of `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")`, several times as fast where matrices are small.

    Args:
        matrices: parameters [R, C]; every one has a gradient at every step.
        lr: learning rate, which means the same as AdamW's.
        weight_decay: share of a weight that a step takes away, in learning rates.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for matrix in matrices:
            rows, columns = matrix.shape
            by_shape.setdefault((rows, columns), []).append(matrix)
        super().__init__([{"params": group} for group in by_shape.values()], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: nothing evaluates the loss again
        """Moves every matrix along the orthogonalised momentum of its gradients."""
        for group in self.param_groups:
            matrices: list[Tensor] = group["params"]
            gradient_NRC = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
            momentum_NRC = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradient_NRC))
            momentum_NRC.lerp_(gradient_NRC, 1 - _MOMENTUM)
            update_NRC = orthogonalized(gradient_NRC.lerp(momentum_NRC, _MOMENTUM))
            scale = group["lr"] * _ADAMW_SIZE * max(update_NRC.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update_NRC), alpha=-scale)


def orthogonalized(matrix_NRC: Tensor) -> Tensor:
    """U S V^T as about U V^T for each matrix: its singular values are brought to between 0.7 and 1.2.

    In float32, though bfloat16 would do: a CPU without instructions for it takes a hundred times as long.
    """
    is_tall = matrix_NRC.shape[1] > matrix_NRC.shape[2]
    x = matrix_NRC.mT if is_tall else matrix_NRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
