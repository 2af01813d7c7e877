"""Intervals hold what they promise, and are known ones where those are known."""

from __future__ import annotations

import math
import random

import pytest

from sa_hf import SparseAttentionError
from sa_hf.tasks.metrics import bootstrap, share_interval, wilson


def test_wilson_is_the_set_of_shares_that_the_score_test_keeps() -> None:
    for right, total in ((0, 10), (3, 10), (22, 32), (500, 500)):
        low, high = wilson(right, total)
        for p in (low, high):
            if 1e-9 < p < 1 - 1e-9:
                assert abs(right / total - p) / math.sqrt(p * (1 - p) / total) == pytest.approx(1.959964, rel=1e-6)
        assert low <= right / total <= high
    assert wilson(22, 32) == pytest.approx((0.514, 0.820), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(SparseAttentionError, match="right=3"):
        wilson(3, 2)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    covered = 0
    for trial in range(200):
        values = [rng.gauss(1.0, 2.0) for _ in range(60)]
        low, high = bootstrap(values, draws=400, seed=trial)
        covered += low <= 1.0 <= high
    assert 0.88 < covered / 200 < 0.99


def test_weights_are_those_of_the_documents() -> None:
    # One heavy document: the interval reaches its value, and the mean of a draw without it the other's.
    low, high = bootstrap([0.0, 1.0], [1, 99])
    assert (low, high) == (0.0, 1.0)
    assert bootstrap([0.25] * 9, [1, 2, 3] * 3) == pytest.approx((0.25, 0.25))
    assert all(math.isnan(end) for end in bootstrap([]))


def test_answers_of_one_row_are_not_independent() -> None:
    rows = [4, 0] * 10
    low, high = share_interval(rows, [4] * 20)
    alone = wilson(40, 80)
    assert high - low > 1.5 * (alone[1] - alone[0])
    assert share_interval([1, 0, 1, 0], [1, 1, 1, 0]) == wilson(2, 3)
