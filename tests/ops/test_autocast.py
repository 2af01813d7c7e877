"""Operators compute in the dtype of their inputs, under autocast as without it, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sa_hf
from sa_hf import sparse_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bigbird", {"block_size": 16}),
        ("logsparse", {}),
        ("longnet", {"segment_length": (16, 256), "dilated_ratio": (1, 4)}),
        ("sparse_transformer", {"stride": 16, "summary": 4}),
    ],
)
def test_autocast_changes_nothing(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    config = sa_hf.available_patterns()[name](**fields)
    q, k, v, grad = torch.randn(4, 2, 2, 200, 16, dtype=dtype).unbind()
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = sparse_attention(*leaves, config, causal=True, engine="native")
            out.backward(grad)
        results.append([out.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
