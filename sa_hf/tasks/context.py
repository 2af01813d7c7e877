"""Loss of a causal language model against how much text stands before a token, by a sliding window."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@torch.no_grad()
def sliding_loss(model: Any, chunk: Tensor, length: int, batch_size: int = 1) -> float:
    """Mean negative log-likelihood in nats of the second half of a chunk, each token given at most ``length - 1`` and
    at least ``length // 2`` tokens before it.

    Windows of ``length`` tokens move by half of that, and each scores its last half; so the same tokens are scored at
    every length, and figures of several lengths can be compared.

    Args:
        model: in evaluation mode; it sees windows on its own device.
        chunk: int64 ``[n]``, ``n >= length >= 2``.
        batch_size: windows at once.
    """
    n, step, device = len(chunk), length // 2, next(model.parameters()).device
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    windows = [
        (max(0, min(begin + step, n) - length), begin, min(begin + step, n)) for begin in range(n - n // 2, n, step)
    ]
    total = 0.0
    for at in range(0, len(windows), batch_size):
        batch = windows[at : at + batch_size]
        ids = torch.stack([chunk[start : start + length] for start, _, _ in batch]).to(device)
        first = min(begin - start for start, begin, _ in batch)  # of the tokens scored
        kept = length - first + 1
        logits = model(input_ids=ids, use_cache=False, **({"logits_to_keep": kept} if keeps else {})).logits[
            :, -kept:-1
        ]
        losses = cross_entropy(logits.float().flatten(0, 1), ids[:, first:].flatten(), reduction="none").view(
            len(batch), -1
        )
        for (start, begin, end), row in zip(batch, losses, strict=True):
            total += float(row[begin - start - first : end - start - first].double().sum())
    return total / (n // 2)
