"""Means with confidence intervals, clustered by conversation where rows of one conversation share a label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with a two-sided confidence interval.

    Example:
        Interval(mean=0.31, low=0.28, high=0.34)
    """

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Mean of independent values: Wilson's interval for values that are all 0 or 1, Student's t otherwise."""
    array = np.asarray(values, dtype=np.float64)
    if np.isin(array, (0.0, 1.0)).all():
        wilson = stats.binomtest(int(array.sum()), len(array)).proportion_ci(confidence, method="wilson")
        return Interval(mean=float(array.mean()), low=float(wilson.low), high=float(wilson.high))
    return clustered_interval(array, np.arange(len(array)), confidence=confidence)


def clustered_interval(
    values: Sequence[float] | np.ndarray, groups: Sequence[object] | np.ndarray, *, confidence: float = 0.95
) -> Interval:
    """Mean over rows with a standard error that lets rows of one group be arbitrarily dependent.

    se² = G/(G−1) Σ_g (Σ_{i∈g} (x_i − mean))² / n²   (Liang & Zeger 1986), with Student's t on G − 1 degrees of freedom.
    The interval is infinite with fewer than two groups.
    """
    array = np.asarray(values, dtype=np.float64)
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    num_groups = int(index.max()) + 1
    mean = float(array.mean())
    if num_groups < 2:
        return Interval(mean=mean, low=-np.inf, high=np.inf)
    sums_G = np.bincount(index, weights=array - mean)
    error = float(np.sqrt(num_groups / (num_groups - 1) * np.square(sums_G).sum()) / len(array))
    margin = float(stats.t.ppf(0.5 + confidence / 2, num_groups - 1)) * error
    return Interval(mean=mean, low=mean - margin, high=mean + margin)
