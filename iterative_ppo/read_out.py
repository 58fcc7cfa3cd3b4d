"""Fitting a read-out of a frozen trunk: heads alone, on features that one pass over the logs gives.

The trunk says at every token what it makes of the conversation, h_t and means of h over what that token sees; what it says
does not change, so every ensemble member, penalty, fold and TD(lambda) return is a regression on the same numbers.
N positions that are read, F features (the hidden state and its means), M ensemble members.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from iterative_ppo import distributed, losses
from iterative_ppo.config import QFunctionConfig
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.q_fit import (
    LabelledSequence,
    Predictions,
    bootstrap_weights,
    predict,
    require_returns_for,
    unit_of,
)
from iterative_ppo.q_function import QFunction
from iterative_ppo.supervised import FitHistory, Progress, no_progress

_PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(4, -9, -1))  # from 100 to 0.0001
_NUM_FOLDS = 5
_NUM_BETWEEN = 3
_CHUNK_ROWS = 4096
_MOST_STEPS = 100
_SMALLEST_DEVIATION = 1e-6
_SMALLEST_CHANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOutHistory(FitHistory):
    """Losses by pass, of which there is one but for TD(lambda), and how the penalty was chosen.

    Example:
        ReadOutHistory(train_losses=(0.58,), held_out_losses=(0.69, 0.61), best_pass=1, penalty=1.0,
                       penalty_losses={"10": 0.64, "1": 0.61, "0.1": 0.63})

    `held_out_losses` are of the ensemble's Q, and begin with the constant: the mean return of each member's conversations.
    """

    penalty: float
    penalty_losses: dict[str, float]
    """Cross-validated loss on the training conversations by penalty, from `inf`, the constant, to the weakest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Points:
    """Positions with their features in the fit's units, a row each."""

    feature_NF: Tensor
    weight_NM: Tensor
    target_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """scalar = weight · features in the fit's units + bias, for each member; float64."""

    weight_MF: Tensor
    bias_M: Tensor

    def scalars(self, feature_NF: Tensor) -> Tensor:
        return (feature_NF @ self.weight_MF.float().T).double() + self.bias_M


def read_positions(sequence: LabelledSequence) -> list[int]:
    """Where a sequence is read: each state, a few tokens of each response, and its end."""
    return [position for position, *_ in _places(sequence)]


def fit_read_out(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    *,
    held_out: Sequence[bool],
    config: QFunctionConfig,
    features: FeatureCache,
    tokens_per_batch: int,
    generator: np.random.Generator,
    retarget: Callable[[Predictions], list[tuple[float, ...]]] | None = None,
    progress: Progress = no_progress,
) -> ReadOutHistory:
    """Regresses Q's heads on the returns by L-BFGS: Σ w loss / Σ w + penalty/2 |weights|², in standardised features, those of
    the means times their reliability.

    What is read weighs as in `fit_q_function`: the end of a response 1, the state before it 1, a few tokens in between 1
    together; and each ensemble member has its bootstrap of the conversations. HL-Gauss, which is a way to train a trunk,
    is squared error here. The penalty is that of the lowest loss at the ends of responses of conversations left out, in
    folds of the training conversations; where none is below that of the mean return, Q is the mean return.

    Args:
        q_function: a read-out of a frozen trunk; its heads are set.
        held_out: the sequences that decide between passes, always by their returns as given.
        features: what is known of the trunk's features; what is lacking is computed and kept there.
        retarget: makes new targets of the training sequences from Q's present predictions on them (TD(λ) returns);
            asked before every pass but the first, of `max_passes` at most.

    Raises:
        ValueError: returns outside [0, 1] with the logistic link.
    """
    require_returns_for(q_function.link, np.concatenate([sequence.returns for sequence in sequences]))
    assert any(held_out), "nothing to decide by"
    weight_of = bootstrap_weights(sequences, num_heads=q_function.heads.shape[0], generator=generator)
    read = _read(q_function, sequences, features, tokens_per_batch=tokens_per_batch, progress=progress)

    def fit() -> tuple[Tensor, ReadOutHistory]:
        regression = _Regression(q_function, sequences, read, held_out, weight_of, config)
        history = regression.fit(
            generator,
            retarget,
            lambda train: predict(q_function, train, tokens_per_batch=tokens_per_batch, features=features),
            progress,
        )
        return q_function.heads.detach().cpu(), history

    heads, history = distributed.on_main(fit)
    with torch.no_grad():
        q_function.heads.copy_(heads)
    return history


def refit_read_out(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    targets: Sequence[tuple[float, ...]],
    *,
    penalty: float,
    config: QFunctionConfig,
    features: FeatureCache,
    tokens_per_batch: int,
    generator: np.random.Generator,
    progress: Progress = no_progress,
) -> None:
    """The same regression with a penalty that has been chosen, on all sequences: those held out have done their work.

    Args:
        targets: of each sequence, one a span.
    """
    weight_of = bootstrap_weights(sequences, num_heads=q_function.heads.shape[0], generator=generator)
    read = _read(q_function, sequences, features, tokens_per_batch=tokens_per_batch, progress=progress)

    def refit() -> Tensor:
        _Regression(q_function, sequences, read, [False] * len(sequences), weight_of, config).refit(targets, penalty)
        return q_function.heads.detach().cpu()

    heads = distributed.on_main(refit)
    with torch.no_grad():
        q_function.heads.copy_(heads)


def _read(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    features: FeatureCache,
    *,
    tokens_per_batch: int,
    progress: Progress,
) -> list[Tensor]:
    return features.of(
        q_function,
        [sequence.token_ids for sequence in sequences],
        [read_positions(sequence) for sequence in sequences],
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )


@dataclass(frozen=True, slots=True)
class _Moments:
    """Weighted sums over positions, float64: all that a linear regression needs."""

    weight: Tensor
    feature_F: Tensor
    target: Tensor
    square_FF: Tensor
    product_F: Tensor

    @classmethod
    def of(cls, feature_NF: Tensor, weight_N: Tensor, target_N: Tensor) -> "_Moments":
        """Products in float32, sums of many in float64: a weak penalty must still be more than the rounding."""
        num_features = feature_NF.shape[1]
        shapes = ((), (num_features,), (), (num_features, num_features), (num_features,))
        sums = cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
        for x_CF, w_C, y_C in zip(*(x.split(_CHUNK_ROWS) for x in (feature_NF, weight_N, target_N)), strict=True):
            weighted_CF = x_CF * w_C[:, None]
            sums.weight.add_(w_C.sum())
            sums.feature_F.add_(weighted_CF.sum(0))
            sums.target.add_((w_C * y_C).sum())
            sums.square_FF.add_(weighted_CF.T @ x_CF)
            sums.product_F.add_(weighted_CF.T @ y_C)
        return sums

    @property
    def mean(self) -> Tensor:
        """Of the features [F]."""
        return self.feature_F / self.weight

    def covariance(self) -> Tensor:
        """Of the features [F, F]."""
        return self.square_FF / self.weight - torch.outer(self.mean, self.mean)

    def minus(self, other: "_Moments") -> "_Moments":
        return _Moments(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class _Regression:
    """The heads' regression on features that stay as they are, in the processor's memory."""

    def __init__(
        self,
        q_function: QFunction,
        sequences: Sequence[LabelledSequence],
        read: Sequence[Tensor],
        held_out: Sequence[bool],
        weight_of: dict[str, Tensor],
        config: QFunctionConfig,
    ) -> None:
        self.q_function = q_function
        self.config = config
        self.is_cross_entropy = config.loss == "binary_cross_entropy"
        returns = np.concatenate([sequence.returns for sequence in sequences])
        self.return_unit = 1.0 if q_function.link == "logistic" else unit_of(returns)
        rows = range(len(sequences))
        train_rows = [row for row in rows if not held_out[row]]
        self.train = [sequences[row] for row in train_rows]
        self.num_states = q_function.model.config.get_text_config().hidden_size
        feature_NF, reliability_N1 = self._parted([read[row] for row in train_rows])
        variance_F, self.mean_F = torch.var_mean(feature_NF, dim=0, correction=0)
        deviation_F = variance_F.sqrt()
        self.feature_unit_F = deviation_F.where(deviation_F > _SMALLEST_DEVIATION, 1.0)
        # Means times their reliability shall still vary by 1, so that a penalty means the same for short conversations.
        self.feature_unit_F[self.num_states :] *= reliability_N1.square().mean().sqrt()
        self.points = _Points(
            feature_NF=self._standardised(feature_NF, reliability_N1),
            weight_NM=torch.cat([_weights(s)[:, None] * weight_of[s.group] for s in self.train]).double(),
            target_N=self._targets([sequence.returns for sequence in self.train]),
        )
        self.weight_N = torch.cat([_weights(s) for s in self.train])
        self.is_end_N = torch.tensor([is_end for s in self.train for *_, is_end in _places(s)])
        self.moments = self._moments_of(slice(None))
        out = [row for row in rows if held_out[row]]
        self.held_out = self._ends([sequences[row] for row in out], [read[row] for row in out]) if out else None

    def _ends(self, sequences: Sequence[LabelledSequence], read: Sequence[Tensor]) -> _Points:
        """The ends of responses, all with the same weight and their returns as given."""
        is_end = [torch.tensor([is_end for *_, is_end in _places(sequence)]) for sequence in sequences]
        feature_NF, reliability_N1 = self._parted([of_row[own] for of_row, own in zip(read, is_end, strict=True)])
        target_N = torch.cat([_targets(s, s.returns) for s in sequences])[torch.cat(is_end)]
        return _Points(
            feature_NF=self._standardised(feature_NF, reliability_N1),
            weight_NM=torch.ones(len(target_N), 1, dtype=torch.float64),
            target_N=target_N / self.return_unit,
        )

    def refit(self, targets: Sequence[tuple[float, ...]], penalty: float) -> None:
        """Leaves the Q-function with the heads of one penalty and the training sequences' targets."""
        points = replace(self.points, target_N=self._targets(targets))
        self._set(self._minimised(self._constant(), points, penalty))

    def fit(
        self,
        generator: np.random.Generator,
        retarget: Callable[[Predictions], list[tuple[float, ...]]] | None,
        predict_on: Callable[[Sequence[LabelledSequence]], Predictions],
        progress: Progress,
    ) -> ReadOutHistory:
        """Leaves the Q-function with the best pass's heads; the constant's, where none is better."""
        constant = self._constant()
        held_out_losses = [self._held_out_loss(constant)]
        penalty_losses = self._cross_validated_losses(generator, progress)
        penalty = min(_PENALTIES, key=penalty_losses.__getitem__)
        heads = self._minimised(constant, self.points, penalty)
        held_out_losses.append(self._held_out_loss(heads))
        train_losses = [self._train_loss(heads, self.points)]
        best_pass = int(penalty_losses[penalty] < penalty_losses[math.inf])
        best = heads if best_pass else constant
        self._set(heads)
        for pass_ in range(2, self.config.max_passes + 1):
            if retarget is None:
                break
            targets = retarget(predict_on(self.train))
            points = replace(self.points, target_N=self._targets(targets))
            heads = self._minimised(heads, points, penalty)
            self._set(heads)
            train_losses.append(self._train_loss(heads, points))
            held_out_losses.append(self._held_out_loss(heads))
            if held_out_losses[-1] < held_out_losses[best_pass]:
                best_pass, best = pass_, heads
            elif pass_ - max(best_pass, 1) >= self.config.patience_passes:
                break
        self._set(best)
        return ReadOutHistory(
            train_losses=tuple(train_losses),
            held_out_losses=tuple(held_out_losses),
            best_pass=best_pass,
            penalty=penalty,
            penalty_losses={f"{tried:g}": loss for tried, loss in penalty_losses.items()},
        )

    def _cross_validated_losses(self, generator: np.random.Generator, progress: Progress) -> dict[float, float]:
        """Mean loss at the ends of responses of conversations left out, by penalty; infinity is the constant's.

        Of one Newton step from the constant, which takes squared errors without a link to their minimum: enough to tell
        penalties apart, and all of them come from the same sums.
        """
        groups = sorted({sequence.group for sequence in self.train})
        num_folds = min(_NUM_FOLDS, len(groups))
        if num_folds < 2:  # nothing to leave out, and nothing to go by but the constant
            return dict.fromkeys((math.inf, *_PENALTIES), 0.0)
        fold_of = dict(zip(groups, (generator.permutation(len(groups)) % num_folds).tolist(), strict=True))
        fold_N = torch.tensor([fold_of[s.group] for s in self.train for _ in _places(s)])
        losses_of: dict[float, list[Tensor]] = {penalty: [] for penalty in (math.inf, *_PENALTIES)}
        for fold in range(num_folds):
            out = fold_N == fold
            ends = out & self.is_end_N
            steps = self._newton_steps(self.moments.minus(self._moments_of(out)))
            for found, heads in zip(losses_of.values(), steps, strict=True):
                scalar_N = heads.scalars(self.points.feature_NF[ends])[:, 0]
                found.append(self._losses(scalar_N, self.points.target_N[ends]))
            progress("choose the penalty", fold + 1, num_folds)
        return {penalty: float(torch.cat(found).mean()) for penalty, found in losses_of.items()}

    def _moments_of(self, rows: Tensor | slice) -> _Moments:
        points = self.points
        return _Moments.of(points.feature_NF[rows], self.weight_N[rows], points.target_N[rows].float())

    def _newton_steps(self, moments: _Moments) -> Iterator[_Heads]:
        """The constant, and from there one Newton step for each penalty."""
        mean_F, mean = moments.mean, float(moments.target / moments.weight)
        scalar, slope, curvature = self._at_constant(mean)
        slope_F = slope * (moments.product_F / moments.weight - mean_F * mean)
        curvature_FF = curvature * moments.covariance()
        for penalty in (math.inf, *_PENALTIES):
            weight_F = torch.zeros_like(mean_F)
            if penalty < math.inf:
                factor_FF = _factor(curvature_FF, penalty)
                weight_F = torch.cholesky_solve(slope_F[:, None], factor_FF)[:, 0]
            yield _Heads(weight_MF=weight_F[None], bias_M=(scalar - mean_F @ weight_F)[None])

    def _at_constant(self, mean: float) -> tuple[float, float, float]:
        """The scalar that gives the mean target, and there, in the scalar, the loss's slope for each unit that the target
        lies above it, and the loss's curvature."""
        if self.q_function.link == "identity":
            return mean, 2.0, 2.0
        mean = min(max(mean, _SMALLEST_CHANCE), 1 - _SMALLEST_CHANCE)
        variance = mean * (1 - mean)  # the link's slope
        scalar = math.log(mean / (1 - mean))
        return (scalar, 1.0, variance) if self.is_cross_entropy else (scalar, 2 * variance, 2 * variance**2)

    def _constant(self) -> _Heads:
        """Each member's mean return, whatever the features."""
        weight_NM = self.points.weight_NM
        mean_M = (weight_NM * self.points.target_N[:, None]).sum(0) / weight_NM.sum(0).clamp(min=1e-12)
        if self.q_function.link == "logistic":
            mean_M = mean_M.clamp(_SMALLEST_CHANCE, 1 - _SMALLEST_CHANCE).logit()
        num_features = self.points.feature_NF.shape[1]
        return _Heads(weight_MF=torch.zeros(len(mean_M), num_features, dtype=torch.float64), bias_M=mean_M)

    def _minimised(self, start: _Heads, points: _Points, penalty: float) -> _Heads:
        """By L-BFGS over weights times the factor of the second derivative, in which all directions are about as steep."""
        _, _, curvature = self._at_constant(float(self.moments.target / self.moments.weight))
        factor_FF = _factor(curvature * self.moments.covariance(), penalty)
        scaled_MF = (start.weight_MF @ factor_FF).requires_grad_()
        bias_M = start.bias_M.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled_MF, bias_M],
            max_iter=_MOST_STEPS,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def heads() -> _Heads:
            weight_MF = torch.linalg.solve_triangular(factor_FF, scaled_MF, upper=False, left=False)
            return _Heads(weight_MF=weight_MF, bias_M=bias_M)

        def objective() -> Tensor:
            optimizer.zero_grad()
            found = heads()
            total = self._member_losses(found, points).sum() + penalty / 2 * found.weight_MF.square().sum()
            total.backward()
            return total.detach()

        with torch.enable_grad():
            optimizer.step(objective)
        with torch.no_grad():
            found = heads()
            return _Heads(weight_MF=found.weight_MF, bias_M=found.bias_M.clone())

    def _member_losses(self, heads: _Heads, points: _Points) -> Tensor:
        """Every member's weighted mean loss."""
        scalar_NM = heads.scalars(points.feature_NF)
        loss_NM = self._losses(scalar_NM, points.target_N[:, None].expand_as(scalar_NM))
        return (loss_NM * points.weight_NM).sum(0) / points.weight_NM.sum(0).clamp(min=1e-12)

    def _losses(self, scalar: Tensor, target: Tensor) -> Tensor:
        """The loss of each scalar."""
        if self.is_cross_entropy:
            return losses.binary_cross_entropy(scalar, target)
        return losses.squared_error(self.q_function.to_value(scalar), target)

    @torch.no_grad()
    def _train_loss(self, heads: _Heads, points: _Points) -> float:
        return float(self._member_losses(heads, points).mean())

    @torch.no_grad()
    def _held_out_loss(self, heads: _Heads) -> float:
        """Of Q, which is the mean head's: each member has seen a part of the conversations, and by itself is worse."""
        assert self.held_out is not None
        mean = _Heads(weight_MF=heads.weight_MF.mean(0, keepdim=True), bias_M=heads.bias_M.mean(0, keepdim=True))
        return float(self._member_losses(mean, self.held_out))

    @torch.no_grad()
    def _set(self, heads: _Heads) -> None:
        """Gives the Q-function heads for features and returns in their own units."""
        weight_MF = heads.weight_MF / self.feature_unit_F
        of_mean_MF = -weight_MF * self.mean_F
        of_reliability_M = of_mean_MF[:, self.num_states :].sum(1)
        constants_M2 = torch.stack([of_reliability_M, heads.bias_M + of_mean_MF[:, : self.num_states].sum(1)], dim=1)
        self.q_function.heads.copy_(self.return_unit * torch.cat([weight_MF, constants_M2], dim=1))

    def _parted(self, read: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states and means [N, F], and the reliability [N, 1] that the means were multiplied by."""
        reliability_N1 = torch.cat([of_row[:, -2:-1] for of_row in read])
        feature_NF = torch.cat([of_row[:, :-2] for of_row in read])
        feature_NF[:, self.num_states :].div_(reliability_N1)
        return feature_NF, reliability_N1

    def _standardised(self, feature_NF: Tensor, reliability_N1: Tensor) -> Tensor:
        """In the fit's units; in place: it is the largest thing here."""
        feature_NF.sub_(self.mean_F).div_(self.feature_unit_F)
        feature_NF[:, self.num_states :].mul_(reliability_N1)
        return feature_NF

    def _targets(self, targets: Sequence[tuple[float, ...]]) -> Tensor:
        """Of every training point, in the fit's unit."""
        target_N = torch.cat([_targets(s, target) for s, target in zip(self.train, targets, strict=True)])
        return target_N.clamp(0, 1) if self.q_function.link == "logistic" else target_N / self.return_unit


def _factor(curvature_FF: Tensor, penalty: float) -> Tensor:
    """Lower Cholesky factor of the objective's second derivative, the loss's and the penalty's."""
    return torch.linalg.cholesky(curvature_FF + penalty * torch.eye(len(curvature_FF)))


def _places(sequence: LabelledSequence) -> Iterator[tuple[int, int, float, bool]]:
    """Position, span, weight and whether it is the end of a response, of all that is read."""
    for span, (start, end) in enumerate(sequence.spans):
        yield start - 1, span, 1.0, False
        num_between = min(_NUM_BETWEEN, max(end - 1 - start, 0))
        for position in np.linspace(start - 1, end - 1, num_between + 2)[1:-1].round().astype(int).tolist():
            yield position, span, 1.0 / num_between, False
        if end > start:
            yield end - 1, span, 1.0, True


def _weights(sequence: LabelledSequence) -> Tensor:
    return torch.tensor([weight for _, _, weight, _ in _places(sequence)])


def _targets(sequence: LabelledSequence, targets: tuple[float, ...]) -> Tensor:
    return torch.tensor([targets[span] for _, span, *_ in _places(sequence)], dtype=torch.float64)
