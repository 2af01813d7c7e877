"""Figures that the evaluation reports."""

from __future__ import annotations

import math

from torch import Tensor

from sa_hf.errors import SparseAttentionError

# Past this mean loss the exponential says nothing more and soon overflows.
MAX_PERPLEXITY_LOSS = 50.0


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
