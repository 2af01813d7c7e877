"""Encoders of sound whose queries have a term of their own with each distance: WavLM, Wav2Vec2-BERT, SeamlessM4T v2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from gradient_cases import assert_close, with_gradients
from older_releases import WRITTEN_OTHERWISE, older_releases_may, skip_refused, skip_without_reference
from torch import Tensor

import sa_hf
from sa_hf.tools.families.check import build, check
from sa_hf.tools.families.compare import RIGHT, relative_error
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=4, num_sink_tokens=1)
ALL = sa_hf.SlidingWindowAttentionConfig(window=100_000)
NAMES = [
    "WavLMModel", "WavLMForCTC", "Wav2Vec2BertModel", "Wav2Vec2BertForCTC", "SeamlessM4Tv2ForSpeechToText",
    "SeamlessM4TForSpeechToText",
]  # fmt: skip
FRAMES = 50
# Refused on an older release, by whose code the layers are not what the adapters ask in the stead of.
THERE = f"{WRITTEN_OTHERWISE}|has two encoder stacks|modeling_wav2vec2_bert.py"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_reloads(name: str) -> None:
    skip_without_reference(name)
    found = check(ENTRIES[name])
    skip_refused(found)
    assert found.status == RIGHT, found.reason
    assert {"reload", "sliding_window gradients"} <= found.figures.keys()
    assert "encoder" in found.patched


def drawn(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def model_of(kind: str, **values: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model, and two rows of sound as long as ``FRAMES`` frames, the second of which has padding."""
    generator, mask = torch.Generator().manual_seed(2), torch.ones(2, FRAMES, dtype=torch.long)
    mask[1, 31:] = 0
    if kind == "wavlm":
        sizes = {"conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2}
        places = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "max_bucket_distance": 12}
        model = tf.WavLMModel(tf.WavLMConfig(**{**SMALL, **sizes, **places, "num_buckets": 16, **values}))
        sound = torch.randn(2, 16 * FRAMES + 4, generator=generator)
        of_samples = torch.ones_like(sound, dtype=torch.long)
        of_samples[1, 16 * 31 + 4 :] = 0
        return drawn(model), {"input_values": sound, "attention_mask": of_samples}
    sizes = {"feature_projection_input_dim": 12, "left_max_position_embeddings": 9, "right_max_position_embeddings": 3}
    model = tf.Wav2Vec2BertModel(tf.Wav2Vec2BertConfig(**{**SMALL, **sizes, "conv_depthwise_kernel_size": 5, **values}))
    return drawn(model), {"input_features": torch.randn(2, FRAMES, 12, generator=generator), "attention_mask": mask}


def run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs on frames that are no padding, and the gradient of every parameter."""
    out = model(**given).last_hidden_state
    return with_gradients(model, torch.cat([out[0], out[1, :30]]))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["wavlm", "bert"])
def test_all_pairs_are_the_models_own_attention(kind: str, padded: bool) -> None:
    """By its unpatched code, longer than its farthest distance; the table's gradients come from every layer."""
    model, given = model_of(kind)
    if not padded:
        given.pop("attention_mask")
    dense = run(model, given)
    table = "rel_attn_embed" if kind == "wavlm" else "distance_embedding"
    assert any(table in name for name in dense)
    sa_hf.patch_model(model, ALL)
    with own_attention(model, zeros=padded):  # Wav2Vec2-BERT's convolutions read rows of padding, which are 0 here
        own = run(model, given)
    assert_close(run(model, given), own)
    if kind == "wavlm" or not padded:
        assert_close(own, dense)
    sa_hf.patch_model(model, WINDOW)
    narrow = run(model, given)
    assert relative_error(narrow["output"], dense["output"]) > 1e-3
    skip_without_reference(type(model).__name__)
    with own_attention(model, zeros=padded):
        assert_close(narrow, run(model, given))
    with sa_hf.dense(model):
        assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items())


@pytest.mark.parametrize("layers", ["0", "1"])
@pytest.mark.parametrize(
    "name", ["WavLMModel", "Wav2Vec2BertModel", "Wav2Vec2ConformerModel", "SeamlessM4TForSpeechToText"]
)
def test_a_layer_left_dense_beside_a_sparse_one(name: str, layers: str) -> None:
    """It may make a bias of all pairs by itself, which was read as a table of distances."""
    model, given = build(ENTRIES[name])
    with torch.no_grad():
        dense = model(**given)[0]
        with older_releases_may(THERE):
            sa_hf.patch_model(model, ALL, layers=layers)
        assert relative_error(model(**given)[0], dense) < 1e-5


@pytest.mark.parametrize("kind", ["relative", "relative_key", "rotary", None])
def test_positions_of_each_kind(kind: str | None) -> None:
    model, given = model_of("bert", position_embeddings_type=kind)
    given.pop("attention_mask")
    with torch.no_grad():
        dense = model(**given).last_hidden_state
        with older_releases_may(THERE):
            sa_hf.patch_model(model, ALL)
        assert relative_error(model(**given).last_hidden_state, dense) < 1e-5
        sa_hf.patch_model(model, WINDOW)
        assert relative_error(model(**given).last_hidden_state, dense) > 1e-2


def test_checkpointed_layers_share_the_first_ones_biases() -> None:
    dropouts = ("hidden", "attention", "activation", "feat_proj", "final")
    off = {f"{name}_dropout": 0.0 for name in dropouts}
    model, given = model_of("wavlm", layerdrop=0.0, apply_spec_augment=False, **off)
    sa_hf.patch_model(model.train(), WINDOW)
    plain = run(model, given)
    model.gradient_checkpointing_enable()
    assert_close(run(model, given), plain)


def test_learned_patterns_and_long_sound_in_chunks_are_refused() -> None:
    for kind in ("wavlm", "bert"):
        with pytest.raises(sa_hf.UnsupportedModelError, match="makes of the distance to the other"):
            sa_hf.patch_model(model_of(kind)[0], "routing", num_clusters=2)
    model, given = build(ENTRIES["SeamlessM4Tv2ForSpeechToText"])
    frames = given["input_features"].shape[1]
    with torch.no_grad():
        dense = model(**given)[0]
        with older_releases_may(THERE):
            sa_hf.patch_model(model, ALL)
        _chunked(model, frames)
        assert relative_error(model(**given)[0], dense) < 1e-5
        _chunked(model, frames - 1)
        with pytest.raises(
            sa_hf.SparseAttentionError, match=f"{frames} frames of sound are more than the {frames - 1}"
        ):
            model(**given)


def _chunked(model: Any, frames: int) -> None:
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "speech_encoder_chunk_size"):
            part.config.speech_encoder_chunk_size = frames
