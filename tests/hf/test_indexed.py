"""Attention that chooses its keys by an indexer: the pattern alone, as long as that would choose all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import scattered
from gradient_cases import assert_close, with_gradients
from older_releases import OLDER
from torch import Tensor

import sa_hf
from sa_hf.tools.families.check import build, check
from sa_hf.tools.families.compare import RIGHT, relative_error
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=5, num_sink_tokens=1)
ALL = sa_hf.SlidingWindowAttentionConfig(window=1000)
NAMES = ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "Dots3NoteForCausalLM", "HYV4ForCausalLM", "AXK2ForCausalLM"]
LENGTH, CHOSEN = 40, 8


def built(name: str, **values: Any) -> Any:
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    if OLDER and name == "GlmMoeDsaForCausalLM":
        pytest.skip(f"transformers {tf.__version__}: {name} spreads what it has chosen in place, and is refused")
    model, _ = build(ENTRIES[name])
    for field, value in values.items():
        setattr(model.config, field, value)
    torch.manual_seed(0)
    return scattered(type(model)(model.config).eval())


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(5, 28, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_gradients(model, model(**given).logits[given["attention_mask"].bool()])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_padding_generation_and_reloads(name: str) -> None:
    built(name)
    found = check(ENTRIES[name])
    assert found.status == RIGHT, found.reason
    assert {"reload", "sliding_window gradients", "padded left", "generation, dynamic"} <= found.figures.keys()


def test_a_pattern_is_the_models_own_attention_under_its_pairs() -> None:
    model, given = built("DeepseekV32ForCausalLM"), inputs()
    dense = run(model, given)
    sa_hf.patch_model(model, ALL)
    assert_close(run(model, given), dense)
    sa_hf.patch_model(model, WINDOW)
    narrow = run(model, given)
    assert relative_error(narrow["output"], dense["output"]) > 1e-2
    with own_attention(model):
        assert_close(narrow, run(model, given))


@pytest.mark.parametrize("name", ["DeepseekV32ForCausalLM", "MiniMaxM3VLForCausalLM"])
def test_a_layer_left_dense_reads_the_keys_that_its_indexer_chooses(name: str) -> None:
    """It read all of them, in silence, where its model hands the choice on (MiniMax M3)."""
    if name == "MiniMaxM3VLForCausalLM":
        kinds = ["full_attention", "minimax_m3_sparse"]
        values = {"layer_types": kinds, "index_block_size": 4, "index_topk_blocks": 2, "index_local_blocks": 1}
    else:
        values = {"index_topk": CHOSEN}
    model, given = built(name, **values), inputs()
    given = {name: x[:1] for name, x in given.items()}
    dense = run(model, given)["output"]
    wide = run(built(name, **{**values, "index_topk": LENGTH, "index_topk_blocks": LENGTH}), given)["output"]
    assert relative_error(wide, dense) > 1e-3  # what it chooses matters
    sa_hf.patch_model(model, "dense")
    assert relative_error(run(model, given)["output"], dense) < 1e-5
    if name == "MiniMaxM3VLForCausalLM":
        sa_hf.patch_model(model, ALL, layers="0")
        assert relative_error(run(model, given)["output"], dense) < 1e-5


def test_more_tokens_than_it_chooses_are_refused() -> None:
    model, given = built("DeepseekV32ForCausalLM", index_topk=LENGTH - 1), inputs()
    sa_hf.patch_model(model, WINDOW)
    with pytest.raises(sa_hf.SparseAttentionError, match=r"over 40 tokens.*index_topk=39.*index_topk=40"):
        model(**given)
    model(**{name: x[:, 1:] for name, x in given.items()})


def test_layers_that_share_a_choice_get_a_pattern_together() -> None:
    model, given = built("GlmMoeDsaForCausalLM", indexer_types=["full", "shared"]), inputs()
    dense = run(model, given)
    sa_hf.patch_model(model, ALL)
    assert_close(run(model, given), dense)
    sa_hf.patch_model(model, ALL, layers="1")
    assert relative_error(run(model, given)["output"], dense["output"]) < 1e-5
    sa_hf.patch_model(model, ALL, layers="0")
    with pytest.raises(sa_hf.SparseAttentionError, match="layer 1 reads the keys that an earlier layer's indexer"):
        model(**given)
