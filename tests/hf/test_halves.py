"""Encoder-decoders of which one half can get no pattern: the other gets it, and ``summary`` says what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from older_releases import REFUSED_THERE, older_releases_may, skip_refused
from torch import Tensor

import sa_hf
from sa_hf.hf.patching.skeleton import partly_known, skeleton_of
from sa_hf.tools.families.check import FIRST, build, check
from sa_hf.tools.families.compare import RIGHT, outputs
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
# The half that gets the pattern, the one that is left, and why.
HALVES = {
    "LongT5ForConditionalGeneration": ("decoder", "encoder", "computes its attention itself"),
    "PegasusXForConditionalGeneration": ("decoder", "encoder", "computes its attention itself"),
}


def built(name: str) -> tuple[Any, dict[str, Any]]:
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    return build(ENTRIES[name])


@pytest.mark.parametrize("name", HALVES)
def test_outputs_gradients_padding_generation_and_reloads(name: str) -> None:
    built(name)
    found = check(ENTRIES[name])
    skip_refused(found)
    assert found.status == RIGHT, found.reason
    assert found.patched == HALVES[name][0]
    assert {"reload", f"{FIRST.name} gradients", "padded left", "generation, dynamic"} <= found.figures.keys()


@pytest.mark.parametrize("name", HALVES)
def test_the_other_half_is_left_and_said(name: str) -> None:
    patched, left, reason = HALVES[name]
    model, inputs = built(name)
    before = outputs(model, inputs)
    with older_releases_may(REFUSED_THERE):
        sa_hf.patch_model(model, FIRST)
    found = sa_hf.summary(model, 128)
    assert {layer.stack for layer in found.layers} == {patched}
    assert reason in found.left[left]
    assert f"left as it is: {left}, " in str(found)
    sparse = outputs(model, inputs)
    with sa_hf.dense(model):
        assert equal(outputs(model, inputs), before)
    assert not equal(sparse, before)
    sa_hf.patch_model(model, {patched: FIRST})
    assert equal(outputs(model, inputs), sparse)
    with pytest.raises(sa_hf.SparseAttentionError, match=f"{left!r} cannot get a pattern: .*{reason}"):
        sa_hf.patch_model(model, {left: FIRST})
    sa_hf.unpatch_model(model)
    assert equal(outputs(model, inputs), before)


def test_an_encoder_that_is_left_gives_what_it_gave() -> None:
    model, inputs = built("LongT5ForConditionalGeneration")
    before = outputs(model, inputs)["encoder_last_hidden_state"]
    with older_releases_may(REFUSED_THERE):
        sa_hf.patch_model(model, FIRST)
    assert torch.equal(outputs(model, inputs)["encoder_last_hidden_state"], before)


@pytest.mark.parametrize("window", [5, 6])
def test_a_window_over_both_sides(window: int) -> None:
    """T5Gemma 2's encoder reads (w + 1) // 2 - 1 tokens back and w // 2 ahead: a pattern that covers them is dense, and
    one that keeps a token less of either side is not."""
    config = built("T5Gemma2Model")[0].config
    config.encoder.text_config.sliding_window = window
    config.encoder.text_config.layer_types = ["sliding_attention"] * config.encoder.text_config.num_hidden_layers
    torch.manual_seed(0)
    model = tf.T5Gemma2Model(config).eval()
    inputs = {"input_ids": ids(19), "attention_mask": torch.ones(2, 19, dtype=torch.long), "decoder_input_ids": ids(7)}
    before = outputs(model, inputs)["encoder_last_hidden_state"]
    sa_hf.patch_model(model, "sliding_window", window=window // 2 + 1)
    assert torch.allclose(outputs(model, inputs)["encoder_last_hidden_state"], before, atol=1e-4)
    sa_hf.patch_model(model, "sliding_window", window=1000)  # of which the model's own window is left
    assert torch.allclose(outputs(model, inputs)["encoder_last_hidden_state"], before, atol=1e-4)
    sa_hf.patch_model(model, "sliding_window", window=window // 2)
    assert not torch.allclose(outputs(model, inputs)["encoder_last_hidden_state"], before, atol=1e-4)


def test_the_probe_runs_the_half_that_is_left_by_an_attention_of_transformers() -> None:
    model, _ = built("LongT5ForConditionalGeneration")
    with older_releases_may(REFUSED_THERE):
        sa_hf.patch_model(model, FIRST)
    (half,) = model.sa_hf_patch.sites.halves
    with partly_known() as mode:
        skeleton = skeleton_of(model, mode, "sdpa", "eager", [half])
    inside = {name: f"{name}.".startswith(f"{half}.") for name, module in skeleton.named_modules()}
    for left, asked in ((True, "eager"), (False, "sdpa")):
        modules = [skeleton.get_submodule(name) for name, within in inside.items() if within is left]
        assert {m.config._attn_implementation for m in modules if hasattr(m, "config")} == {asked}


def ids(length: int) -> Tensor:
    return torch.randint(5, 28, (2, length), generator=torch.Generator().manual_seed(length))


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], value) for name, value in expected.items())
