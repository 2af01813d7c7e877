"""Dropout masks against independent draws: no row, column or pair of them shows through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sa_hf.ops.random import dropout_keep, dropout_words

N = 1024


def mask(seed: int, dropout: float) -> Tensor:
    """Kept or dropped, centred and of variance 1, fp64 ``[N, N]``: neighbouring positions, as a model has them."""
    words = (
        dropout_words(torch.tensor(seed), torch.tensor(0), torch.tensor(3), torch.arange(N), stream=stream)
        for stream in (0, 1)
    )
    rows, columns = words
    kept = dropout_keep(rows[:, None], columns[None], dropout).double()
    return (kept - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_masks_are_those_of_independent_draws(seed: int, dropout: float) -> None:
    found = mask(seed, dropout)
    assert abs(float(found.mean())) < 4 / N  # a standard deviation is 1 / N
    for x in (found, found.T):
        # Means of rows scatter as those of N independent draws do: 1 / sqrt(N), itself known to 1 / sqrt(2 N) = 2 %.
        assert float(x.mean(1).std()) * N**0.5 == pytest.approx(1, abs=0.1)
        correlation = (x @ x.T / N).fill_diagonal_(0)
        assert float(correlation.square().mean().sqrt()) * N**0.5 == pytest.approx(1, abs=0.02)
        neighbours = torch.diagonal(correlation, 1)
        assert abs(float(neighbours.mean())) < 4 / N
    # A structure over many rows and columns would be a singular value above that of a random matrix, 2 sqrt(N).
    assert float(torch.linalg.matrix_norm(found, 2)) < 1.05 * 2 * N**0.5
    corners = found[1:, 1:] * found[:-1, 1:] * found[1:, :-1] * found[:-1, :-1]
    assert abs(float(corners.mean())) < 5 / N * max(1.0, float(corners.std()))


def test_two_seeds_have_unrelated_masks() -> None:
    one, other = mask(1, 0.1), mask(2, 0.1)
    assert abs(float((one * other).mean())) < 4 / N
    assert float((one @ other.T / N).square().mean().sqrt()) * N**0.5 == pytest.approx(1, abs=0.02)
