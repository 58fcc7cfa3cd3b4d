"""What a Q-function can and cannot tell, on conversations that it was not fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

from iterative_ppo.intervals import Interval, clustered_interval
from iterative_ppo.q_fit import Predictions

Measure = Literal["auc", "spearman"]

_NUM_CALIBRATION_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """A tenth of the held-out decision points, by predicted value.

    Example:
        CalibrationBin(predicted=0.31, observed=0.28, num_points=120)
    """

    predicted: float
    observed: float
    num_points: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnDiscrimination:
    """How well Q orders conversations at one turn: AUC for a binary return, Spearman's correlation otherwise.

    Example:
        TurnDiscrimination(turn=2, num_points=300, discrimination=0.74)
    """

    turn: int
    num_points: int
    discrimination: float | None
    """None where all returns or all predictions are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QReport:
    """Held-out quality of a Q-function.

    Losses are the fit's own (binary cross-entropy, or squared error). A Q that does not beat the state-only
    predictor cannot rank responses to one prompt, whatever its AUC.
    """

    num_points: int
    num_conversations: int
    loss: float
    constant_loss: float
    """Of the training conversations' mean return, predicted everywhere."""
    state_only_loss: float
    """Of the value read before the response."""
    state_only_gain: Interval
    """state_only_loss − loss, clustered by conversation."""
    measure: Measure
    discrimination: float | None
    """Over all held-out decision points together."""
    by_turn: tuple[TurnDiscrimination, ...]
    ece: float
    """Expected calibration error: mean |predicted − observed| over tenths of the points."""
    calibration: tuple[CalibrationBin, ...]
    warnings: tuple[str, ...]


def assess(predictions: Predictions, *, constant: float, loss: Literal["cross_entropy", "squared_error"]) -> QReport:
    """Assesses held-out predictions.

    Args:
        predictions: at decision points of conversations that Q was not fitted to.
        constant: mean return of the conversations that it was fitted to.
        loss: the loss to report.
    """
    target = predictions.target
    q_loss = _losses(predictions.q_value, target, loss)
    state_loss = _losses(predictions.state_value, target, loss)
    constant_loss = float(_losses(np.full_like(target, constant), target, loss).mean())
    gain = clustered_interval(state_loss - q_loss, predictions.group)
    warnings = []
    if q_loss.mean() >= constant_loss:
        warnings.append(
            f"Q does not beat the constant predictor (held-out loss {q_loss.mean():.4f} against {constant_loss:.4f}): "
            "it has learnt nothing from these conversations"
        )
    if gain.low <= 0:
        warnings.append(
            f"Q does not beat the state-only predictor (gain {gain.mean:+.5f}, 95 % interval {gain.low:+.5f} to "
            f"{gain.high:+.5f}): these conversations do not show that it can rank responses to the same prompt"
        )
    measure = measure_of(target)
    calibration = calibration_bins(predictions.q_value, target)
    return QReport(
        num_points=len(target),
        num_conversations=len(np.unique(predictions.group)),
        loss=float(q_loss.mean()),
        constant_loss=constant_loss,
        state_only_loss=float(state_loss.mean()),
        state_only_gain=gain,
        measure=measure,
        discrimination=discrimination(predictions.q_value, target, measure=measure),
        by_turn=tuple(
            TurnDiscrimination(
                turn=int(turn),
                num_points=int((predictions.turn == turn).sum()),
                discrimination=discrimination(
                    predictions.q_value[predictions.turn == turn], target[predictions.turn == turn], measure=measure
                ),
            )
            for turn in np.unique(predictions.turn)
        ),
        ece=expected_calibration_error(calibration),
        calibration=calibration,
        warnings=tuple(warnings),
    )


def is_binary(target: np.ndarray) -> bool:
    """Whether the targets take at most two values, so that an AUC is defined."""
    return len(np.unique(target)) <= 2


def measure_of(target: np.ndarray) -> Measure:
    """AUC for binary targets, Spearman's rank correlation for graded ones."""
    return "auc" if is_binary(target) else "spearman"


def discrimination(
    predicted: Sequence[float] | np.ndarray, target: np.ndarray, *, measure: Measure | None = None
) -> float | None:
    """AUC or Spearman's rank correlation (default: whichever fits the targets); None where either side is constant."""
    measure = measure or measure_of(target)
    predicted = np.asarray(predicted, dtype=np.float64)
    if len(np.unique(target)) < 2 or len(np.unique(predicted)) < 2:
        return None
    if measure == "auc":
        return float(roc_auc_score(target == target.max(), predicted))
    return float(stats.spearmanr(predicted, target).statistic)


def calibration_bins(predicted: np.ndarray, target: np.ndarray) -> tuple[CalibrationBin, ...]:
    """The reliability table: tenths of the points by predicted value."""
    # Equal predictions stand for their common mean, so that the order of the conversations does not matter.
    _, level, num_equal = np.unique(predicted, return_inverse=True, return_counts=True)
    target = (np.bincount(level, weights=target) / num_equal)[level]
    order = np.argsort(predicted, kind="stable")
    return tuple(
        CalibrationBin(
            predicted=float(predicted[rows].mean()), observed=float(target[rows].mean()), num_points=len(rows)
        )
        for rows in np.array_split(order, _NUM_CALIBRATION_BINS)
        if len(rows)
    )


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Σ_bins (share of points) · |mean predicted − mean observed|."""
    total = sum(b.num_points for b in bins)
    return sum(b.num_points * abs(b.predicted - b.observed) for b in bins) / total


def _losses(predicted: np.ndarray, target: np.ndarray, loss: Literal["cross_entropy", "squared_error"]) -> np.ndarray:
    if loss == "squared_error":
        return np.square(predicted - target)
    clipped = np.clip(predicted, 1e-7, 1 - 1e-7)
    return -(target * np.log(clipped) + (1 - target) * np.log1p(-clipped))
