"""``block_topk`` on the Triton kernels: outputs and gradients against the dense fp64 oracle of the same choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sa_hf import BlockTopKAttentionConfig, sparse_attention

pytestmark = pytest.mark.usefixtures("nan_filled")
SMALL: dict[str, Any] = {"block_size": 16, "top_k": 1, "num_window_blocks": 1}


CASES: list[tuple[dict[str, Any], bool, bool]] = [  # fields, causal, lists of a fixed capacity as on a GPU
    ({}, True, True),
    ({"selection": "query"}, False, True),
    ({"block_size": 10, "num_sink_blocks": 0}, True, False),
]


@pytest.mark.parametrize(("fields", "causal", "fixed"), CASES, ids=["lists", "queries", "ranges"])
def test_outputs_and_gradients(
    fields: dict[str, Any], causal: bool, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sa_hf.patterns.block_sets", "sa_hf.ops.data_layout"):
        monkeypatch.setattr(f"{module}.exact_lists", lambda device: not fixed)
    config = BlockTopKAttentionConfig(**{**SMALL, **fields})
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 50, 16), (1, 1, 50, 16), (1, 1, 50, 16)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator)
    out = sparse_attention(*leaves, config, causal=causal, engine="triton")
    oracle = sparse_attention(*leaves, config, causal=causal, engine="reference")
    torch.testing.assert_close(out, oracle, rtol=0, atol=2e-6)
    ours, theirs = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(oracle, leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
