"""XLNet: one stream of it under the pattern's pairs, distances and segments included, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from gradient_cases import assert_close, with_gradients
from torch import Tensor

import sa_hf
from sa_hf.tools.families.check import check
from sa_hf.tools.families.compare import RIGHT, relative_error
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=5, num_sink_tokens=1)
ALL = sa_hf.SlidingWindowAttentionConfig(window=100_000)
LENGTH = 50


def model_of(**values: Any) -> Any:
    config = tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=40, **values)
    model = tf.XLNetModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def inputs(padding: str = "left", segments: int = 3) -> dict[str, Tensor]:
    """Two rows, the second padded (XLNet's tokenizer pads on the left), of segments that are not in order."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 99, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[1, 31:] = 0
    given = {"input_ids": ids, "attention_mask": mask.flip(1) if padding == "left" else mask}
    if segments:
        given["token_type_ids"] = torch.randint(0, segments, ids.shape, generator=generator)
    return given


def run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_gradients(model, model(**given).last_hidden_state[given["attention_mask"].bool()])


@pytest.mark.parametrize("padding", ["", "right", "left"])
@pytest.mark.parametrize("segments", [0, 1, 3])
def test_all_pairs_are_the_models_own_attention(segments: int, padding: str) -> None:
    """By its unpatched code; and a pattern is its own under the pattern's pairs."""
    model, given = model_of(), inputs(padding, segments)
    dense = run(model, given)
    assert any(name.endswith(".r") for name in dense)
    assert any("seg_embed" in name for name in dense) == (segments > 0)
    sa_hf.patch_model(model, ALL)
    ours = run(model, given)
    if segments == 1:  # what all pairs get alike has no gradient but for rounding
        ours, dense = ({name: x for name, x in one.items() if "seg" not in name} for one in (ours, dense))
        ours, dense = ({name: x for name, x in one.items() if "r_s_bias" not in name} for one in (ours, dense))
    assert_close(ours, dense)
    sa_hf.patch_model(model, WINDOW)
    narrow = run(model, given)
    assert relative_error(narrow["output"], dense["output"]) > 1e-2
    with own_attention(model):
        assert_close(narrow, run(model, given))
    sa_hf.patch_model(model, ALL, layers="1")
    assert relative_error(run(model, given)["output"], dense["output"]) < 1e-5
    with sa_hf.dense(model):
        assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items() if name in dense)


def test_without_a_mask() -> None:
    """As the model makes no mask of its own then, no number is of a pair."""
    model, given = model_of(), inputs("", 0)
    ids = given["input_ids"]
    with torch.no_grad():
        dense = model(ids).last_hidden_state
        sa_hf.patch_model(model, ALL)
        assert relative_error(model(ids).last_hidden_state, dense) < 1e-5


def test_rows_are_as_alone() -> None:
    """XLNet has tokens before the batch; what a learned pattern chooses is of its own row."""
    model, given = model_of(), inputs("", 2)
    sa_hf.patch_model(model, "block_topk", block_size=4, top_k=2, num_window_blocks=1)
    both = model(**given).last_hidden_state
    alone = torch.cat([model(**{name: x[row : row + 1] for name, x in given.items()})[0] for row in (0, 1)])
    assert torch.allclose(both, alone, atol=1e-5)
    with sa_hf.dense(model):
        assert relative_error(model(**given).last_hidden_state, both) > 1e-2


@pytest.mark.parametrize("name", ["XLNetModel", "XLNetForSequenceClassification", "XLNetLMHeadModel"])
def test_patterns_padding_and_reloads(name: str) -> None:
    found = check(ENTRIES[name])
    assert found.status == RIGHT, found.reason
    assert {"padded left", "padded left gradients", "reload"} <= found.figures.keys()


def test_what_cannot_be_had_is_refused() -> None:
    model, given = sa_hf.patch_model(model_of(), WINDOW), inputs("")
    pairs = torch.zeros(2, LENGTH, LENGTH)
    with pytest.raises(sa_hf.SparseAttentionError, match=r"50 queries .perm_mask"):
        model(**given, perm_mask=pairs)
    with pytest.raises(sa_hf.SparseAttentionError, match="second stream"):
        model(**given, perm_mask=pairs, target_mapping=pairs[:, :1])
    with pytest.raises(sa_hf.SparseAttentionError, match="earlier call"):
        model(**given, mems=model(**given).mems)
    with pytest.raises(sa_hf.SparseAttentionError, match="more than 8 segments"):
        model(**{**given, "token_type_ids": torch.arange(LENGTH).expand(2, -1)})
    with pytest.raises(sa_hf.SparseAttentionError, match=r"dropout=0\.1 drops distances"):
        model.train()(**given)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"attn_type": "uni"}, "attn_type='bi'"), ({"clamp_len": 7}, "clamp_len=7"), ({"bi_data": True}, "bi_data=True")],
)
def test_other_distances_are_refused_at_once(values: dict[str, Any], said: str) -> None:
    with pytest.raises(sa_hf.UnsupportedModelError, match=said):
        sa_hf.patch_model(model_of(**values), WINDOW)
    with pytest.raises(sa_hf.UnsupportedModelError, match="routing would cluster"):
        sa_hf.patch_model(model_of(), "routing", num_clusters=2)
