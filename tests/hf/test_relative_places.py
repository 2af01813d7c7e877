"""Encoders of sound whose scores have a term of distances: their own attention under the pattern's pairs, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from older_releases import OLDER, older_releases_may
from torch import Tensor

import sa_hf
from sa_hf.tools.families.check import build, check
from sa_hf.tools.families.compare import RIGHT
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3, num_sink_tokens=1)
ALL = sa_hf.SlidingWindowAttentionConfig(window=100_000)
NAMES = ["ParakeetForCTC", "CanaryForConditionalGeneration", "CohereAsrModel", "Wav2Vec2ConformerModel"]


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
    if OLDER and dense[0].isnan().any():
        pytest.skip(f"transformers {tf.__version__}: a padded batch of ParakeetEncoder is NaN without a pattern")
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
    model.encode_positions.max_position_embeddings = 3000  # an older release refuses more
    places = model.encode_positions(torch.zeros(1, 3000, model.config.hidden_size))
    hidden = torch.randn(1, 3000, model.config.hidden_size, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        dense = attention(hidden, position_embeddings=places)[0]
        sa_hf.patch_model(model, ALL)
        ours = attention(hidden, position_embeddings=places)[0]
    assert (ours - dense).norm() < 2e-5 * dense.norm()


@pytest.mark.parametrize("width", [1024 + 128, 512 + 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_as_wide_as_the_released_models_on_every_engine_of_the_cpu(width: int, dtype: torch.dtype) -> None:
    """Queries and keys of a head's own channels and the hidden size's, values of the head's alone."""
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(2, 2, 70, d, generator=generator).to(dtype) for d in (width, width, 128)]
    given[2] = torch.nn.functional.pad(given[2], (0, width - 128))  # as the values of a narrower head are
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, 50:] = 0
    upstream = torch.nn.functional.pad(torch.randn(2, 2, 70, 128, generator=generator), (0, width - 128))

    def run(engine: str, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = sa_hf.sparse_attention(*leaves, WINDOW, attention_mask=mask, scale=width**-0.5, engine=engine)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    expected = run("reference", [x.double() for x in given])
    for engine in ("native", "torch"):
        for got, wanted in zip(run(engine, given), expected, strict=True):
            assert (got.double() - wanted).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * wanted.norm()


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


def conformer(**values: Any) -> Any:
    torch.manual_seed(0)
    config = tf.Wav2Vec2ConformerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, conv_dim=[16, 16],
        conv_kernel=[4, 4], conv_stride=[4, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, attn_implementation="eager", **values,
    )  # fmt: skip
    model = tf.Wav2Vec2ConformerModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(8))
    return model


@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_a_conformers_positions_of_each_kind(kind: str | None) -> None:
    model = conformer(position_embeddings_type=kind)
    sound = torch.randn(2, 1600, generator=torch.Generator().manual_seed(9))
    mask = torch.ones(2, 1600, dtype=torch.long)
    mask[1, 900:] = 0
    with torch.no_grad():
        dense = model(sound, attention_mask=mask).last_hidden_state
        sa_hf.patch_model(model, ALL)
        ours = model(sound, attention_mask=mask).last_hidden_state
        with own_attention(model, zeros=True):  # its convolutions read rows of padding, which are 0 here
            zeroed = model(sound, attention_mask=mask).last_hidden_state
        sa_hf.patch_model(model, WINDOW)
        narrow = model(sound, attention_mask=mask).last_hidden_state
    assert (ours - dense)[0].norm() < 1e-5 * dense[0].norm()
    assert (ours - zeroed).norm() < 1e-5 * zeroed.norm()
    assert (narrow - dense)[0].norm() > 1e-3 * dense[0].norm()


def test_a_table_of_other_distances_is_refused() -> None:
    model = conformer()
    sa_hf.patch_model(model, WINDOW)
    model.encoder.embed_positions.pe = model.encoder.embed_positions.pe.flip(1)
    with pytest.raises(sa_hf.UnsupportedModelError, match="are not the sines and cosines"):
        model(torch.randn(1, 1600))
