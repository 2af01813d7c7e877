"""Whole patterns through the public operator on the Triton engine, padded batch included, against the dense oracle."""

from __future__ import annotations

import pytest
import torch
from parity import error

import sa_hf
from sa_hf import sparse_attention

pytestmark = pytest.mark.usefixtures("nan_filled")

CASES = [
    ("sliding_window", {"window": 9, "num_sink_tokens": 2}),
    ("bigbird", {"block_size": 16, "num_random_blocks": 1}),
    ("longnet", {"segment_length": (16, 32), "dilated_ratio": (1, 2)}),
    ("logsparse", {"local_window": 3}),
    ("sparse_transformer", {"kind": "strided", "stride": 8}),
    ("sparse_transformer", {"kind": "fixed", "stride": 16, "summary": 4, "drop_diagonal": True}),
    ("star", {"relay": "token", "ring": False}),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "fields"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_pattern(name: str, fields: dict[str, object], causal: bool) -> None:
    config = sa_hf.available_patterns()[name](**fields)
    n = 43
    g = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 2, n, 16, generator=g) for _ in range(2))
    k, v = (torch.randn(2, 1, n, 16, generator=g) for _ in range(2))
    mask = torch.ones(2, n, dtype=torch.int64)
    mask[1, :11] = 0
    results = []
    for engine in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = sparse_attention(*leaves, config, causal=causal, attention_mask=mask, engine=engine)
        out.backward(grad)
        results.append([out.detach(), *(x.grad for x in leaves)])
    for ours, oracle in zip(*results, strict=True):
        assert error(ours, oracle) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bigbird", "logsparse"])
def test_the_default_dtype_changes_nothing(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that load a model in bfloat16 set it; sums, log-sum-exp and partials stay in fp32."""
    monkeypatch.setattr("sa_hf.ops.triton.lists.SMALLEST_CUT", 2)  # lists are cut: partials
    config = sa_hf.available_patterns()[name](**({"block_size": 16} if name == "bigbird" else {}))
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 130, 16, generator=g) for _ in range(4))
    causal, results = name == "logsparse", []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = sparse_attention(*leaves, config, causal=causal, engine="triton")
            out.backward(grad)
            step = sparse_attention(q[:, :, -1:], k, v, config, causal=True, engine="triton")
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([out.detach(), *(x.grad for x in leaves), step])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
