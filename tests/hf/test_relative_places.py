"""Parakeet's encoder, whose scores have a term of distances: its own attention under the pattern's pairs, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from older_releases import older_releases_may
from torch import Tensor

import sa_hf
from sa_hf.tools.families.check import build, check
from sa_hf.tools.families.compare import RIGHT
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3, num_sink_tokens=1)
ALL = sa_hf.SlidingWindowAttentionConfig(window=100_000)
NAMES = ["ParakeetForCTC", "CanaryForConditionalGeneration", "CohereAsrModel"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_reloads(name: str) -> None:
    if name not in ENTRIES:
        pytest.skip(f"this release has no {name}")
    with older_releases_may("gets a ready-made mask"):
        found = check(ENTRIES[name])
        assert found.status == RIGHT, found.reason
    assert {"reload", "sliding_window gradients"} <= found.figures.keys()


def encoder(**values: Any) -> tuple[Any, Tensor]:
    """One that takes features ``[2, frames, bins]``, and those."""
    model, given = build(ENTRIES["ParakeetEncoder"])
    for name, value in values.items():
        setattr(model.config, name, value)
    features = given["input_features"]
    return model, torch.randn(2, 160, features.shape[-1], generator=torch.Generator().manual_seed(4))


def test_padded_rows_and_every_gradient() -> None:
    model, features = encoder()
    mask = torch.ones(features.shape[:2], dtype=torch.long)
    mask[1, 90:] = 0

    def run() -> list[Tensor]:
        out = model(features, attention_mask=mask)
        real = out.last_hidden_state[out.attention_mask.bool()]
        names, leaves = zip(*model.named_parameters(), strict=True)
        upstream = torch.randn(real.shape, generator=torch.Generator().manual_seed(5))
        found = dict(zip(names, torch.autograd.grad(real, leaves, upstream, allow_unused=True), strict=True))
        kept = {name: g for name, g in found.items() if g is not None}
        assert any("relative_k_proj" in name for name in kept)
        assert any("bias_v" in name for name in kept)
        return [real, *kept.values()]

    dense = run()
    sa_hf.patch_model(model, ALL)
    for got, expected in zip(run(), dense, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=0.1)
    sa_hf.patch_model(model, WINDOW)
    assert (run()[0] - dense[0]).abs().max() > 1e-2
    with sa_hf.dense(model):
        assert all(torch.equal(got, expected) for got, expected in zip(run(), dense, strict=True))
    sa_hf.patch_model(model, ALL, layers="0")  # the other keeps the mask that the model makes
    assert torch.allclose(run()[0], dense[0], atol=1e-4)


def test_far_places_are_as_exact_as_near_ones() -> None:
    """Angles of single places are larger than those of their distances, and would round more."""
    model, _ = encoder()
    attention = model.layers[0].self_attn
    places = model.encode_positions(torch.zeros(1, 3000, model.config.hidden_size))
    hidden = torch.randn(1, 3000, model.config.hidden_size, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        dense = attention(hidden, position_embeddings=places)[0]
        sa_hf.patch_model(model, ALL)
        ours = attention(hidden, position_embeddings=places)[0]
    assert (ours - dense).norm() < 2e-5 * dense.norm()


def test_what_cannot_be_had_is_refused() -> None:
    model, features = encoder(dropout_positions=0.1)
    sa_hf.patch_model(model, WINDOW)
    model(features)
    with pytest.raises(sa_hf.SparseAttentionError, match=r"dropout_positions=0\.1 drops distances"):
        model.train()(features)
    with pytest.raises(sa_hf.UnsupportedModelError, match="routing would cluster"):
        sa_hf.patch_model(model, "routing", num_clusters=2)
    with pytest.raises(sa_hf.UnsupportedModelError, match="extra token"):
        sa_hf.patch_model(model, "star", relay="virtual")
