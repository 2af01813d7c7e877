"""Attention sinks: one logit a head in the softmax's denominator, which takes probability and gives no value."""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """A finished softmax with the sinks joined to its denominator; differentiable through ``out`` and ``sinks``.

    A flash backward needs no more: with ``p = exp(s - lse)`` and ``delta = sum(out * grad_out)`` of what is returned,
    the gradients of queries, keys and values are exact.

    Args:
        out: ``[B, H, N, Dv]``; lse: ``[B, H, N]``, the log-sum-exp of the row's scores, -inf where it has no key.
        sinks: ``[H]`` logits, in the units of the scores; None leaves all as it is.

    Returns:
        ``out`` in its dtype and ``lse``; rows without a key stay 0 and -inf.
    """
    if sinks is None:
        return out, lse
    logits = sinks.to(lse.dtype)[:, None]
    share = torch.sigmoid(lse - logits).unsqueeze(-1)
    joined = torch.where(torch.isneginf(lse), lse, torch.logaddexp(lse, logits))
    return (out.to(share.dtype) * share).to(out.dtype), joined


def sinks_gradient(out: Tensor, lse: Tensor, grad_out: Tensor, sinks: Tensor | None) -> Tensor | None:
    """The gradient of the sinks ``[H]`` in their dtype, from what :func:`with_sinks` returned; None without sinks."""
    if sinks is None:
        return None
    probability = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(torch.isneginf(lse), 0.0)
    delta = (out.to(lse.dtype) * grad_out.to(lse.dtype)).sum(-1)
    return -(probability * delta).sum((0, 2)).to(sinks.dtype)
