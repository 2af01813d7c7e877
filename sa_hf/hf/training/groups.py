"""Optimizer groups for the learned sparse state."""

from __future__ import annotations

from typing import Any

from torch import nn

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError


def parameter_groups(model: nn.Module, weight_decay: float, sparse_lr: float = 1e-2) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: ``torch.optim.AdamW(parameter_groups(model, 0.01), lr=5e-5)``.

    Mask logits and spans learn at ``sparse_lr`` without weight decay (at the rate of the weights Adam would not move
    them); weights decay; biases and norms do not. Works for models that are not patched, too.

    Raises:
        SparseAttentionError: a rate or decay that is no number >= 0.
    """
    for label, value in (("weight_decay", weight_decay), ("sparse_lr", sparse_lr)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise SparseAttentionError(f"{label}={value!r} must be a number >= 0; nearest: 0.0")
    learned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, SparseAttention)
        for parameter in module.parameters(recurse=False)
    }
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": float(weight_decay)},
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": 0.0, "lr": float(sparse_lr)},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            place = 2 if id(parameter) in learned else 0 if parameter.dim() > 1 else 1
            groups[place]["params"].append(parameter)
    return [group for group in groups if group["params"]]
