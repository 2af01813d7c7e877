"""Figures that the evaluation reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError

# Past this mean loss the exponential says nothing more and soon overflows.
MAX_PERPLEXITY_LOSS = 50.0
Z_95 = 1.959964  # of the normal distribution, two sides
DRAWS_AT_ONCE = 100


def quantile_loss(predicted: Tensor, target: Tensor, quantile: float) -> float:
    """The normalised quantile loss R_quantile (LogSparse, section 5; DeepAR).

    ``2 * sum(max(q * (y - p), (q - 1) * (y - p))) / sum(|y|)`` over all entries.

    Args:
        predicted: the ``quantile``-quantile of the forecast, floating, any shape.
        target: what came, same shape.
        quantile: in (0, 1); 0.5 and 0.9 are the paper's.

    Raises:
        SparseAttentionError: shapes that differ, a quantile outside (0, 1), or targets that are all 0.
    """
    if predicted.shape != target.shape:
        raise SparseAttentionError(
            f"predicted {tuple(predicted.shape)} and target {tuple(target.shape)} must have one shape"
        )
    if not 0 < quantile < 1:
        raise SparseAttentionError(f"quantile={quantile} must lie in (0, 1); usual: 0.5 and 0.9")
    scale = target.double().abs().sum()
    if scale == 0:
        raise SparseAttentionError("the targets are all 0, so the normalised quantile loss is not defined")
    error = target.double() - predicted.double()
    return float(2 * (quantile * error).maximum((quantile - 1) * error).sum() / scale)


def perplexity(loss: float) -> float:
    """``exp`` of a mean negative log-likelihood per token in nats; infinite where it would say nothing more."""
    return math.exp(loss) if loss < MAX_PERPLEXITY_LOSS else math.inf


def accuracy(classes: Tensor, labels: Tensor, ignored: int = -100) -> float:
    """Share of positions where the predicted class is the label; integers of one shape.

    Positions with the label ``ignored`` do not count; NaN where none is left.
    """
    counted = labels != ignored
    right = (classes == labels) & counted
    total = int(counted.sum())
    return int(right.sum()) / total if total else math.nan


def wilson(right: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95 % by default: of right answers, each of its own.

    Args:
        right, total: counts; ``0 <= right <= total``. Of none, the interval is all of [0, 1].
        z: quantile of the normal distribution.
    """
    if not 0 <= right <= total:
        raise SparseAttentionError(f"right={right} must lie in [0, total={total}]")
    if total == 0:
        return 0.0, 1.0
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean (Efron 1979): of scores, one for each document.

    Args:
        weights: of the values, e.g. the tokens of each document; documents are drawn, each with its weight.

    Returns:
        The same for the same values; NaN where there is none.
    """
    if not len(values):
        return math.nan, math.nan
    of = torch.ones(len(values), dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
    sums = torch.as_tensor(values).double() * of
    generator = torch.Generator().manual_seed(seed)
    means = []
    for begin in range(0, draws, DRAWS_AT_ONCE):
        chosen = torch.randint(len(sums), (min(DRAWS_AT_ONCE, draws - begin), len(sums)), generator=generator)
        means.append(sums[chosen].sum(1) / of[chosen].sum(1).clamp(min=1e-300))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def share_interval(right: Sequence[int], counted: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of the share of right answers over rows: Wilson's where each row has one answer, else the
    bootstrap's over rows, as the answers of a row are not independent.

    Args:
        right, counted: of each row, how many answers are right, and how many there are; rows with none do not count.
    """
    rows = [(r, c) for r, c in zip(right, counted, strict=True) if c]
    if all(c == 1 for _, c in rows):
        return wilson(sum(r for r, _ in rows), len(rows))
    return bootstrap([r / c for r, c in rows], [c for _, c in rows])
