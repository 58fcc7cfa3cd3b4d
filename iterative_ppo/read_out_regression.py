"""Regularised linear regression on rows that stay as they are: squared errors or log losses, through a link or without.

N rows, F standardised features, M ensemble members.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from iterative_ppo import losses
from iterative_ppo.supervised import Progress

PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(4, -9, -1))  # from 100 to 0.0001
_NUM_FOLDS = 5
_CHUNK_ROWS = 4096
_MOST_STEPS = 100
_SMALLEST_CHANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """The rows of a regression, in its units."""

    feature_NF: Tensor
    member_weight_NM: Tensor
    """How often each member's bootstrap drew the row's conversation."""
    target_N: Tensor
    """Float64; a chance where there is a logistic link."""
    is_end_N: Tensor
    """Which rows a fit is judged by."""
    group_N: Sequence[str]
    """The conversation, or group of them, that each row is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """scalar = weight · features + bias, for each member; float64."""

    weight_MF: Tensor
    bias_M: Tensor

    def scalars(self, feature_NF: Tensor) -> Tensor:
        """[N, M]."""
        return (feature_NF @ self.weight_MF.float().T).double() + self.bias_M

    def mean(self) -> "Heads":
        """The ensemble's one head."""
        return Heads(weight_MF=self.weight_MF.mean(0, keepdim=True), bias_M=self.bias_M.mean(0, keepdim=True))


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over rows, float64: all that a linear regression needs."""

    num_rows: Tensor
    feature_F: Tensor
    target: Tensor
    square_FF: Tensor
    product_F: Tensor

    @classmethod
    def of(cls, feature_NF: Tensor, target_N: Tensor) -> "_Moments":
        """Products in float32, sums of many in float64: a weak penalty must still be more than the rounding."""
        num_features = feature_NF.shape[1]
        shapes = ((), (num_features,), (), (num_features, num_features), (num_features,))
        sums = cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
        for x_CF, y_C in zip(feature_NF.split(_CHUNK_ROWS), target_N.float().split(_CHUNK_ROWS), strict=True):
            sums.num_rows.add_(len(y_C))
            sums.feature_F.add_(x_CF.sum(0))
            sums.target.add_(y_C.sum())
            sums.square_FF.add_(x_CF.T @ x_CF)
            sums.product_F.add_(x_CF.T @ y_C)
        return sums

    @property
    def mean(self) -> Tensor:
        """Of the features [F]."""
        return self.feature_F / self.num_rows

    @property
    def mean_target(self) -> float:
        return float(self.target / self.num_rows)

    def covariance(self) -> Tensor:
        """Of the features [F, F]."""
        return self.square_FF / self.num_rows - torch.outer(self.mean, self.mean)

    def minus(self, other: "_Moments") -> "_Moments":
        return _Moments(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class Regression:
    """Mean loss + penalty/2 |weights|², minimised by each member.

    Args:
        is_logistic: whether predictions are the logistic function of scalars; else they are the scalars.
        is_cross_entropy: the loss; else it is the squared error.
    """

    def __init__(self, points: Points, *, is_logistic: bool, is_cross_entropy: bool) -> None:
        self.points = points
        self.is_logistic = is_logistic
        self.is_cross_entropy = is_cross_entropy
        self.moments = self._moments_of(slice(None))
        # The fit to all rows is one more member, the first.
        once_N1 = torch.ones_like(points.member_weight_NM[:, :1])
        self._weight_NM = torch.cat([once_N1, points.member_weight_NM], dim=1)

    def penalty_losses(self, generator: np.random.Generator, progress: Progress) -> dict[float, float]:
        """Mean loss at the ends of responses of conversations left out, by penalty; infinity is the constant's.

        Of one Newton step from the constant, which takes squared errors without a link to their minimum: enough to tell
        penalties apart, and all of them come from the same sums.
        """
        groups = sorted(set(self.points.group_N))
        num_folds = min(_NUM_FOLDS, len(groups))
        if num_folds < 2:  # nothing to leave out, and nothing to go by but the constant
            return dict.fromkeys((math.inf, *PENALTIES), 0.0)
        fold_of = dict(zip(groups, (generator.permutation(len(groups)) % num_folds).tolist(), strict=True))
        fold_N = torch.tensor([fold_of[group] for group in self.points.group_N])
        losses_of: dict[float, list[Tensor]] = {penalty: [] for penalty in (math.inf, *PENALTIES)}
        for fold in range(num_folds):
            out = fold_N == fold
            ends = out & self.points.is_end_N
            feature_NF, target_N = self.points.feature_NF[ends], self.points.target_N[ends]
            steps = self._newton_steps(self.moments.minus(self._moments_of(out)))
            for found, heads in zip(losses_of.values(), steps, strict=True):
                found.append(self.element_loss(heads.scalars(feature_NF)[:, 0], target_N))
            progress("choose the penalty", fold + 1, num_folds)
        return {penalty: float(torch.cat(found).mean()) for penalty, found in losses_of.items()}

    def constant(self) -> Heads:
        """The mean target, whatever the features, for every member."""
        num_members, num_features = self.points.member_weight_NM.shape[1], self.points.feature_NF.shape[1]
        scalar, *_ = self._at_constant(self.moments.mean_target)
        return Heads(
            weight_MF=torch.zeros(num_members, num_features, dtype=torch.float64),
            bias_M=torch.full((num_members,), scalar, dtype=torch.float64),
        )

    def minimised(self, start: Heads, target_N: Tensor, penalty: float) -> Heads:
        """By L-BFGS over weights times the factor of the second derivative, in which all directions are about as steep.

        The members' mean is the fit to all rows, each once: they differ from it as the fits to their bootstraps differ
        from the mean of those, whose own scatter would be noise in Q.

        Args:
            target_N: the rows' targets.
        """
        _, _, curvature = self._at_constant(self.moments.mean_target)
        factor_FF = _factor(curvature * self.moments.covariance(), penalty)
        mean = start.mean()
        scaled_MF = (torch.cat([mean.weight_MF, start.weight_MF]) @ factor_FF).requires_grad_()
        bias_M = torch.cat([mean.bias_M, start.bias_M]).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled_MF, bias_M],
            max_iter=_MOST_STEPS,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def heads() -> Heads:
            weight_MF = torch.linalg.solve_triangular(factor_FF, scaled_MF, upper=False, left=False)
            return Heads(weight_MF=weight_MF, bias_M=bias_M)

        def objective() -> Tensor:
            optimizer.zero_grad()
            found = heads()
            total = self._member_losses(found, target_N).sum() + penalty / 2 * found.weight_MF.square().sum()
            total.backward()
            return total.detach()

        with torch.enable_grad():
            optimizer.step(objective)
        with torch.no_grad():
            found = heads()
            return Heads(weight_MF=_around_first(found.weight_MF), bias_M=_around_first(found.bias_M))

    @torch.no_grad()
    def train_loss(self, heads: Heads, target_N: Tensor) -> float:
        """Of the mean head."""
        return float(self.element_loss(heads.mean().scalars(self.points.feature_NF)[:, 0], target_N).mean())

    def element_loss(self, scalar: Tensor, target: Tensor) -> Tensor:
        """The loss of each scalar."""
        if self.is_cross_entropy:
            return losses.binary_cross_entropy(scalar, target)
        return losses.squared_error(scalar.sigmoid() if self.is_logistic else scalar, target)

    def _member_losses(self, heads: Heads, target_N: Tensor) -> Tensor:
        """The mean loss of the fit to all rows, and of every member on its bootstrap."""
        scalar_NM = heads.scalars(self.points.feature_NF)
        loss_NM = self.element_loss(scalar_NM, target_N[:, None].expand_as(scalar_NM))
        weight_NM = self._weight_NM
        return (loss_NM * weight_NM).sum(0) / weight_NM.sum(0).clamp(min=1e-12)

    def _moments_of(self, rows: Tensor | slice) -> _Moments:
        points = self.points
        return _Moments.of(points.feature_NF[rows], points.target_N[rows])

    def _newton_steps(self, moments: _Moments) -> Iterator[Heads]:
        """The constant, and from there one Newton step for each penalty."""
        mean_F, mean = moments.mean, moments.mean_target
        scalar, slope, curvature = self._at_constant(mean)
        slope_F = slope * (moments.product_F / moments.num_rows - mean_F * mean)
        curvature_FF = curvature * moments.covariance()
        for penalty in (math.inf, *PENALTIES):
            weight_F = torch.zeros_like(mean_F)
            if penalty < math.inf:
                factor_FF = _factor(curvature_FF, penalty)
                weight_F = torch.cholesky_solve(slope_F[:, None], factor_FF)[:, 0]
            yield Heads(weight_MF=weight_F[None], bias_M=(scalar - mean_F @ weight_F)[None])

    def _at_constant(self, mean: float) -> tuple[float, float, float]:
        """The scalar that gives the mean target, and there, in the scalar, the loss's slope for each unit that the target
        lies above it, and the loss's curvature."""
        if not self.is_logistic:
            return mean, 2.0, 2.0
        mean = min(max(mean, _SMALLEST_CHANCE), 1 - _SMALLEST_CHANCE)
        variance = mean * (1 - mean)  # the link's slope
        scalar = math.log(mean / (1 - mean))
        return (scalar, 1.0, variance) if self.is_cross_entropy else (scalar, 2 * variance, 2 * variance**2)


def _around_first(x_MX: Tensor) -> Tensor:
    """All but the first, moved so that their mean is the first."""
    return x_MX[1:] - x_MX[1:].mean(0) + x_MX[0]


def _factor(curvature_FF: Tensor, penalty: float) -> Tensor:
    """Lower Cholesky factor of the objective's second derivative, the loss's and the penalty's."""
    return torch.linalg.cholesky(curvature_FF + penalty * torch.eye(len(curvature_FF)))
