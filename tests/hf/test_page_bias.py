"""LayoutLMv3: the bias of where words stand on a page, under the pattern's pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from gradient_cases import assert_close, with_gradients
from older_releases import REFUSED_THERE, older_releases_may, skip_refused
from torch import Tensor

import sa_hf
from sa_hf.tools.families.check import check
from sa_hf.tools.families.compare import RIGHT, relative_error
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=5, num_sink_tokens=1)
ALL = sa_hf.SlidingWindowAttentionConfig(window=100_000)
LENGTH, PATCHES = 40, 16


def model_of(**values: Any) -> Any:
    config = tf.LayoutLMv3Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=80, coordinate_size=4, shape_size=8, input_size=32, patch_size=8, max_rel_pos=16,
        rel_pos_bins=8, max_rel_2d_pos=64, rel_2d_pos_bins=16, attn_implementation="eager", **values,
    )  # fmt: skip
    model = tf.LayoutLMv3Model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "rel_pos" in name else 0.2, generator=generator)
    return model.eval()


@pytest.fixture(autouse=True)
def _served() -> None:
    with older_releases_may(f"{REFUSED_THERE}|does not call transformers' AttentionInterface"):
        sa_hf.patch_model(model_of(), WINDOW)


def inputs() -> dict[str, Tensor]:
    """Words with boxes, of which the second row has fewer, and an image of 16 patches behind them."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 99, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 29:] = 0
    low = torch.randint(0, 500, (2, LENGTH, 2), generator=generator)
    boxes = torch.cat([low, low + torch.randint(0, 400, (2, LENGTH, 2), generator=generator)], -1)
    return {"input_ids": ids, "attention_mask": mask, "bbox": boxes, "pixel_values": torch.randn(
        2, 3, 32, 32, generator=generator
    )}  # fmt: skip


def run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    seen = torch.nn.functional.pad(given["attention_mask"], (0, PATCHES + 1), value=1).bool()
    out = model(**given).last_hidden_state
    return with_gradients(model, out[seen[:, : out.shape[1]]])


@pytest.mark.parametrize("biases", ["both", "distances", "none"])
def test_a_pattern_is_the_models_own_attention_under_its_pairs(biases: str) -> None:
    values = {"has_relative_attention_bias": biases != "none", "has_spatial_attention_bias": biases == "both"}
    model, given = model_of(**values), inputs()
    dense = run(model, given)
    sa_hf.patch_model(model, ALL)
    assert_close(run(model, given), dense)
    sa_hf.patch_model(model, ALL, layers="1")
    assert relative_error(run(model, given)["output"], dense["output"]) < 1e-5
    sa_hf.patch_model(model, WINDOW)
    narrow = run(model, given)
    assert relative_error(narrow["output"], dense["output"]) > 1e-2
    with own_attention(model):
        assert_close(narrow, run(model, given))
    with sa_hf.dense(model):
        assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items())


def test_the_bias_matters() -> None:
    """Words that stand elsewhere are read otherwise, by their bias alone."""
    model, given = sa_hf.patch_model(model_of(), WINDOW), inputs()
    before = model(**given).last_hidden_state
    model.encoder.rel_pos_x_bias.weight.data.zero_()
    assert relative_error(model(**given).last_hidden_state, before) > 1e-2


@pytest.mark.parametrize("name", ["LayoutLMv3Model", "LayoutLMv3ForTokenClassification"])
def test_patterns_padding_and_reloads(name: str) -> None:
    found = check(ENTRIES[name])
    skip_refused(found)
    assert found.status == RIGHT, found.reason
    assert {"reload", "sliding_window gradients"} <= found.figures.keys()


def test_what_has_no_place_on_the_page_is_refused() -> None:
    with pytest.raises(sa_hf.UnsupportedModelError, match="extra token"):
        sa_hf.patch_model(model_of(), "star", relay="virtual")
    with pytest.raises(sa_hf.UnsupportedModelError, match="routing would compare"):
        sa_hf.patch_model(model_of(), "routing", num_clusters=2)
