"""Intervals by bootstrap: of a mean, and of the share that one mean keeps of another over the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95
AT_ONCE = 2**22  # numbers drawn at once: 32 MB


class Interval(NamedTuple):
    """A figure, and the bounds of its interval."""

    value: float
    low: float
    high: float


def mean_interval(items: Sequence[float], seed: int = 0) -> Interval:
    """The mean of the items and the percentile bootstrap's 95 % interval.

    Raises:
        ValueError: there are no items.
    """
    values = _checked(items)
    return _interval(float(values.mean()), _resampled(values[None], seed)[0])


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """``mean(ours) / mean(theirs)`` with items in pairs: both are resampled together. NaN where theirs are all 0.

    Raises:
        ValueError: there are no items, or not as many of both.
    """
    pairs = np.stack([_checked(ours), _checked(theirs)]) if len(ours) == len(theirs) else None
    if pairs is None:
        raise ValueError(f"{len(ours)} items against {len(theirs)}: pairs need as many of both")
    means = _resampled(pairs, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, ratios = pairs[0].mean() / pairs[1].mean(), means[0] / means[1]
    return _interval(float(value), ratios[np.isfinite(ratios)])


def _checked(items: Sequence[float]) -> np.ndarray:
    if not len(items):
        raise ValueError("an interval needs items, and there are none")
    return np.asarray(items, dtype=np.float64)


def _resampled(rows: np.ndarray, seed: int) -> np.ndarray:
    """Means of ``rows [R, n]`` under ``RESAMPLES`` draws of n items with replacement, ``[R, RESAMPLES]``."""
    generator = np.random.default_rng(seed)
    count = rows.shape[1]
    chunk = max(1, AT_ONCE // count)
    means = []
    for begin in range(0, RESAMPLES, chunk):
        drawn = generator.integers(0, count, (min(chunk, RESAMPLES - begin), count))
        means.append(rows[:, drawn].mean(-1))
    return np.concatenate(means, axis=1)


def _interval(value: float, means: np.ndarray) -> Interval:
    if not means.size:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(value, float(low), float(high))
