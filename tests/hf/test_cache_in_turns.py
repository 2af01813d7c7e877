"""A cache that dense(model), another mode or another model adds to in between: what a pattern keeps of each token is
then missing for some, and the next sparse step says so."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from generation_cases import PATTERNS, TOLERANCE
from hf_cases import tiny_model, tokens

import sa_hf
from sa_hf import SparseAttentionError

NEEDS_EVERY_TOKEN = ["convolution", "expire_span", "routing", "block_topk"]


def patched(pattern: Any) -> Any:
    """Of one layer, so that dense and sparse keys are the same."""
    return sa_hf.patch_model(tiny_model("llama", num_hidden_layers=1), pattern)


def in_turns(model: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of sparse steps after sparse and dense ones, and those of the full forward."""
    ids = tokens(2, 30)
    cache = sa_hf.sparse_cache(model) if kind == "sparse" else tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        with sa_hf.dense(model):
            for start in (12, 16):
                model(ids[:, start : start + 4], past_key_values=cache)
        steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(20, 30)]
        return torch.cat(steps, 1), model(ids, use_cache=False).logits[:, 20:]


@pytest.mark.parametrize("pattern", NEEDS_EVERY_TOKEN)
def test_tokens_that_a_pattern_has_not_seen_raise(pattern: str) -> None:
    with pytest.raises(SparseAttentionError, match=r"of 12 alone.*inside dense|keys of a convolution"):
        in_turns(patched(PATTERNS[pattern]), "dynamic")


@pytest.mark.parametrize("indexer", [False, True])
def test_a_part_of_a_mixture_and_an_indexer_raise_as_well(indexer: bool) -> None:
    chosen = sa_hf.BlockTopKAttentionConfig(block_size=3, top_k=2, num_window_blocks=1, indexer=indexer)
    pattern: Any = chosen if indexer else {"heads": {"0-1": "star", "2-3": chosen}}
    with pytest.raises(SparseAttentionError, match="of 12 alone"):
        in_turns(patched(pattern), "dynamic")


@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {*NEEDS_EVERY_TOKEN, "three"}))
def test_others_go_on(pattern: str) -> None:
    steps, expected = in_turns(patched(PATTERNS[pattern]), "dynamic")
    assert (steps - expected).abs().max() < TOLERANCE


def test_a_copied_cache_may_be_read_densely_in_between() -> None:
    model, ids = patched(PATTERNS["routing"]), tokens(2, 16)
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        with sa_hf.dense(model):
            model(ids[:, 12:], past_key_values=copy.deepcopy(cache))
        step = model(ids[:, 12:13], past_key_values=cache).logits
        expected = model(ids[:, :13], use_cache=False).logits[:, 12:]
    assert (step - expected).abs().max() < TOLERANCE


def test_a_change_of_the_mode_is_named() -> None:
    model, ids = patched(PATTERNS["expire_span"]), tokens(2, 16)
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        cache.layers[0].sa_hf_memory["inputs"] = copy.deepcopy(cache.layers[0].sa_hf_memory["spans"])
        model(ids[:, 8:12], past_key_values=cache)
        model.train()
        with pytest.raises(SparseAttentionError, match=r"in the other mode \(training or evaluation\)"):
            model(ids[:, 12:], past_key_values=cache)


SPANS, CLUSTERS, CONVOLVED = PATTERNS["expire_span"], PATTERNS["routing"], PATTERNS["convolution"]
CHOSEN = PATTERNS["block_topk"]
SWITCHED = {
    "spans": (SPANS, replace(SPANS, max_span=9)),
    "clusters": (CLUSTERS, replace(CLUSTERS, num_clusters=2)),
    "convolution": (CONVOLVED, replace(CONVOLVED, conv_kernel_size=2)),
    "convolution to window": (CONVOLVED, PATTERNS["window"]),
    "chosen": (CHOSEN, replace(CHOSEN, block_size=4)),
    "clusters to spans": (CLUSTERS, SPANS),
    "part": ({"heads": {"0-1": "star", "2-3": SPANS}}, SPANS),
}


@pytest.mark.parametrize("kind", ["dynamic", "sparse"])
@pytest.mark.parametrize("case", SWITCHED)
def test_what_another_pattern_has_made_of_each_token_raises(case: str, kind: str) -> None:
    before, after = SWITCHED[case]
    model, ids = patched(before), tokens(2, 16)
    cache = sa_hf.sparse_cache(model) if kind == "sparse" else tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        sa_hf.patch_model(model, after)
        with pytest.raises(SparseAttentionError, match=r"(has made of each token|those that .* reads).*start again"):
            model(ids[:, 12:13], past_key_values=cache)
        sa_hf.patch_model(model, before)
        model(ids[:, 12:], past_key_values=cache)  # which it goes on serving


@pytest.mark.parametrize("change", [{"pooling": "mean"}, {"block_size": 3}, {"top_k": 2}])
def test_what_another_pattern_has_pooled_is_pooled_anew(change: dict[str, Any]) -> None:
    model, ids = patched(PATTERNS["chosen_by_query"]), tokens(2, 30)
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :21], past_key_values=cache)
        model(ids[:, 21:22], past_key_values=cache)
        sa_hf.patch_model(model, replace(PATTERNS["chosen_by_query"], **change))
        steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(22, 30)]
        expected = model(ids, use_cache=False).logits[:, 22:]
    assert (torch.cat(steps, 1) - expected).abs().max() < TOLERANCE


def test_a_cache_emptied_by_a_crop_serves_another_pattern() -> None:
    model, ids = patched(CLUSTERS), tokens(2, 9)
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-9)
        sa_hf.patch_model(model, SPANS)
        out = model(ids, past_key_values=cache).logits
    assert torch.equal(out, model(ids).logits)


def test_a_layer_that_was_taken_out_is_named() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), "star")
    model.model.layers = model.model.layers[:1]
    with pytest.raises(SparseAttentionError, match=r"'model.layers.1.self_attn' .* is gone"):
        model(tokens(1, 6))
