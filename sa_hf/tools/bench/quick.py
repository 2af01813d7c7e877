"""One pattern against dense attention on this machine: what ``sa-hf bench`` prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import NotStaticError
from sa_hf.functional import sparse_attention
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.tools.bench.baselines import dense_runs
from sa_hf.tools.bench.parity import Shape, parity
from sa_hf.tools.bench.timing import measure

PARITY_LENGTH = 200


def compare(
    config: SparseAttentionConfig, length: int, *, causal: bool, num_heads: int, head_dim: int
) -> list[list[str]]:
    """Rows (pass, dense ms, sparse ms, first call ms, speed-up), medians, dense and sparse side by side.

    Raises:
        NotStaticError: a pattern with learned state, which runs in a patched model only.
    """
    if not isinstance(config, StaticPatternConfig):
        raise NotStaticError(f"{config.name!r} runs in a patched model only; bench takes the static patterns")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = Shape(1, num_heads, num_heads, PARITY_LENGTH, head_dim)
    if not parity(config, dtype, device, causal=causal, engine="auto", shape=shape).passed:
        return [["parity failed", "", "", "", "not shown"]]
    qkv = [
        torch.randn(1, num_heads, length, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    ]
    dense = next(iter(dense_runs(causal, device)))

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, config, causal=causal)

    begin = time.perf_counter()
    sparse(*qkv)
    first = (time.perf_counter() - begin) * 1e3
    rows = []
    for label, backward in (("forward", False), ("forward+backward", True)):
        ours = _time(sparse, qkv, backward, device)
        with dense.scope():
            theirs = _time(dense.run, qkv, backward, device)
        rows.append([label, f"{theirs:.1f}", f"{ours:.1f}", f"{first:.1f}", f"{theirs / ours:.2f}x"])
    return rows


def _time(run: Callable[..., Tensor], qkv: list[Tensor], backward: bool, device: torch.device) -> float:
    def call() -> Any:
        if backward:
            return torch.autograd.grad(run(*qkv).sum(), qkv)
        with torch.no_grad():
            return run(*qkv)

    return measure([call], device, warm_up=1, repeats=7, seconds=3.0).median_ms
