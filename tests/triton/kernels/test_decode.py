"""Decoding over listed keys: the torch path and the kernel against the fp64 oracle, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parity import error, guarded

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.decode import decode_attention
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.reference import dense_attention

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.parametrize("engine", ["native", "triton"])
@pytest.mark.parametrize(
    ("shape", "lists", "most", "chosen"),
    [
        ((2, 4, 2, 1, 100, 16), 4, 37, {}),
        ((2, 4, 2, 2, 100, 40), 1, 60, {"softcap": 2.0, "bias": True}),
        ((1, 4, 2, 1, 900, 16), 2, 700, {"spans": 4}),
        ((1, 2, 2, 3, 64, 80), 2, 5, {"spans": 1}),
        ((2, 3, 1, 1, 30, 16), 3, 0, {}),
        ((2, 4, 2, 2, 100, 16), 2, 37, {"sinks": True}),
        ((1, 4, 2, 1, 900, 16), 2, 700, {"sinks": True, "spans": 1, "width": 40}),
        ((1, 2, 2, 3, 64, 80), 2, 0, {"sinks": True, "width": 16}),
    ],
)
def test_matches_the_oracle(
    engine: str, shape: tuple[int, ...], lists: int, most: int, chosen: dict[str, object]
) -> None:
    batch, heads, kv_heads, n_q, n_k, d = shape
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, n_q, d, generator=g)
    k = torch.randn(batch, kv_heads, n_k, d, generator=g)
    v = torch.randn(batch, kv_heads, n_k, int(chosen.get("width", d)), generator=g)  # type: ignore[call-overload]
    index = torch.randint(-1, n_k - n_q + 1, (1 if lists == 1 else batch, lists, n_q, most), generator=g)
    index[..., 0, :3] = -1
    options = ScoreOptions(d**-0.5, softcap=chosen.get("softcap"))  # type: ignore[arg-type]
    if "bias" in chosen:
        options = replace(options, distance_bias=torch.randn(heads, 2 * n_k - 1, generator=g), extra_tokens=1)
    if "spans" in chosen:
        spans = torch.rand(batch, int(chosen["spans"]), n_k, generator=g) * n_k  # type: ignore[call-overload]
        options = replace(options, spans=spans, ramp=9.0)
    if "sinks" in chosen:
        options = replace(options, sinks=torch.randn(heads, generator=g))
    wide = index if lists in (1, heads) else index.repeat_interleave(heads // kv_heads, 1)
    wide = wide.expand(batch, heads, n_q, most)
    counts = torch.zeros(batch, heads, n_q, n_k, dtype=torch.int64)
    counts.scatter_add_(3, wide.clamp(min=0), (wide >= 0).long())
    expected, _ = dense_attention(q.double(), k.double(), v.double(), counts, options)
    out = decode_attention(guarded(q), guarded(k), guarded(v), index, options, engine=engine)
    assert error(out, expected) < 2e-6


def test_refusals() -> None:
    q, k = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 9, 16)
    index = torch.zeros(1, 1, 1, 3, dtype=torch.int64)
    with pytest.raises(SparseAttentionError, match=r"dropout=0\.1"):
        decode_attention(q, k, k, index, ScoreOptions(1.0, dropout=0.1))
    with pytest.raises(SparseAttentionError, match="index is"):
        decode_attention(q, k, k, index[:, :, 0], ScoreOptions(1.0))
    with pytest.raises(SparseAttentionError, match="no backward"):
        decode_attention(q, k, k, index, ScoreOptions(1.0, sinks=torch.zeros(2).requires_grad_()), engine="triton")
    with pytest.raises(SparseAttentionError, match="no backward"):
        decode_attention(q.requires_grad_(), k, k, index, ScoreOptions(1.0), engine="triton")
