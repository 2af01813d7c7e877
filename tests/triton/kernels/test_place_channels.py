"""Parakeet's keys, which have channels of places beside their own: what kernels serve of them, and what they say."""

from __future__ import annotations

import pytest
import torch

import sa_hf
from sa_hf.ops.choice import choose_engine
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.triton import TritonEngine
from sa_hf.tools.families.check import build
from sa_hf.tools.families.registry import entries

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3, num_sink_tokens=1)
OPTIONS = ScoreOptions(scale=0.1)


def test_keys_as_wide_as_the_released_models_are_refused_by_their_width() -> None:
    """1024 hidden channels beside heads of 128: on a GPU torch's operators serve them."""
    wide = torch.empty(1, 1, 32, 1024 + 128)
    reason = TritonEngine().unsupported(wide, OPTIONS)
    assert reason == "head_dim=1152 is no multiple of 8 in 16 .. 256"
    assert TritonEngine().unsupported(torch.empty(1, 1, 32, 64 + 128), OPTIONS) is None
    with pytest.raises(sa_hf.SparseAttentionError, match=r"'triton' cannot serve .*head_dim=1152"):
        choose_engine("triton", wide, OPTIONS)
    assert type(choose_engine("torch", wide, OPTIONS)).__name__ == "TileEngine"


def test_an_encoder_that_is_narrow_enough_gives_what_torchs_operators_give() -> None:
    model, given = build(next(entry for entry in entries() if entry.name == "ParakeetEncoder"))
    features = given["input_features"]
    found = []
    for engine in ("torch", "triton"):
        sa_hf.patch_model(model, WINDOW, engine=engine)
        assert {layer.engine for layer in sa_hf.summary(model, 24).layers} == {engine}
        out = model(features).last_hidden_state
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        kept = [p for name, p in model.named_parameters() if "relative_k_proj" in name or "bias_v" in name]
        found.append([out, *torch.autograd.grad(out, kept, upstream)])
    for got, expected in zip(*reversed(found), strict=True):
        assert (got - expected).norm() < 1e-4 * expected.norm()
