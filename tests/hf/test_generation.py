"""Generation: each step's logits are the row of the full causal forward, whatever the cache and the search."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as tf
from generation_cases import EXPIRING, NEW, PATTERNS, TOLERANCE, check, full_rows, generate, patched, prompt
from hf_cases import BOTH, DECODERS, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.hf.forward import keys
from sa_hf.hf.forward.keys import absolute_keys


@pytest.mark.parametrize("family", [*DECODERS, *BOTH])
def test_greedy_steps_equal_the_full_forward(family: str) -> None:
    check(patched(family, "window"))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("pattern", ["bigbird", "fixed", "expire_span", "convolution"])
def test_positions_stay_true_where_the_models_own_cache_slides(family: str, pattern: str) -> None:
    check(patched(family, pattern))


@pytest.mark.parametrize("pattern", ["bigbird", "window", "longnet"])
def test_a_sliding_caches_keys_are_read_where_they_lie(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def spied(key: Tensor, value: Tensor, length: int, *rest: Any) -> tuple[Tensor, Tensor]:
        widths.append(length)
        return absolute_keys(key, value, length, *rest)

    model = patched("mistral", pattern)
    monkeypatch.setattr(keys, "absolute_keys", spied)
    check(model)
    ids, mask = prompt()
    widths.clear()
    generate(model, ids, mask)  # its window is 8: from the second step on its cache has dropped keys
    assert widths == [ids.shape[1]] * model.config.num_hidden_layers


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_decodes(pattern: str) -> None:
    check(patched("llama", pattern))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution", "block_topk"])
def test_static_cache(family: str, pattern: str) -> None:
    check(patched(family, pattern), cache_implementation="static")


def test_shared_queries_and_keys() -> None:
    model = tiny_model("gpt2")
    sa_hf.patch_model(model, "routing", num_clusters=3, window=4, shared_qk=True)
    check(model)
    check(model, cache_implementation="static")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral", "t5"])
@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution", "routing", "block_topk"])
def test_beams(family: str, pattern: str) -> None:
    if family == "t5" and pattern == "routing":
        pattern = "three"
    model = patched(family, pattern)
    ids, mask = prompt()
    cached = generate(model, ids, mask, num_beams=3, output_scores=True)
    plain = generate(model, ids, mask, num_beams=3, use_cache=False, output_scores=True)
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.allclose(cached.sequences_scores, plain.sequences_scores, atol=1e-4)


@pytest.mark.parametrize(
    "pattern", ["window", "expire_span", "convolution", "routing", "three", "block_topk", "chosen_by_query"]
)
def test_prefill_in_chunks(pattern: str) -> None:
    check(patched("llama", pattern), prefill_chunk_size=4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution", "routing", "block_topk"])
def test_assisted_generation(family: str, pattern: str) -> None:
    """Guesses that are taken back crop the cache, and what a pattern remembers with it."""
    model = patched(family, pattern)
    ids = tokens(1, 8).repeat(1, 3)
    mask = torch.ones_like(ids)
    guessed = generate(model, ids, mask, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed.sequences, generate(model, ids, mask).sequences)
    expected = full_rows(model, ids, mask, guessed.sequences)
    assert (torch.stack(guessed.logits, 1) - expected).abs().max() < TOLERANCE


def test_right_padded_prompts() -> None:
    """A mask with zeros inside, once tokens join behind the padding (`generate` then counts positions anew)."""
    model = patched("llama", "window")
    ids, mask = prompt()
    mask = mask.flip(1)
    positions: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda m, a, k: positions.append(k["position_ids"]), with_kwargs=True)
    out = generate(model, ids, mask)
    whole = torch.cat([mask, torch.ones(2, NEW, dtype=torch.long)], dim=1)[:, :-1]
    where = torch.cat([x.expand(2, -1) for x in positions], dim=1)
    with torch.no_grad():
        expected = model(out.sequences[:, :-1], attention_mask=whole, position_ids=where, use_cache=False).logits
    assert (torch.stack(out.logits, 1) - expected[:, -NEW:]).abs().max() < TOLERANCE


def test_a_cache_filled_before_patching_is_refused() -> None:
    model = tiny_model("llama")
    ids = tokens(1, 6)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        sa_hf.patch_model(model, EXPIRING)
        with pytest.raises(SparseAttentionError, match="of another model, from before patching"):
            model(ids[:, :1], past_key_values=cache)


def test_a_crop_deeper_than_what_is_kept_raises() -> None:
    model = patched("llama", "convolution")
    model.config.max_position_embeddings = 256
    cache = tf.DynamicCache()
    with torch.no_grad():
        model(tokens(1, 100), past_key_values=cache)
    cache.crop(-60)  # of the 64 + 2 inputs kept
    with pytest.raises(SparseAttentionError, match="crop by at most 64"):
        cache.crop(-20)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", [(0, 6, 7, 8, 12), (0, 4, 8, 12)], ids=["steps", "chunks"])
def test_a_static_cache_beside_dense_layers(cuts: tuple[int, ...], masked: bool) -> None:
    """Its length is a tensor that grows before a dense layer builds its mask."""
    model = tiny_model("llama")
    sa_hf.patch_model(model, {"0": "dense", "1": "star"})
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = tf.StaticCache(config=model.config, max_cache_len=16)
        steps = [
            model(ids[:, a:b], attention_mask=mask[:, :b] if masked else None, past_key_values=cache).logits
            for a, b in pairwise(cuts)
        ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_padding_between_tokens_where_the_models_own_cache_slides(family: str) -> None:
    model = tiny_model(family)
    sa_hf.patch_model(model, "bigbird", block_size=16)
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 10:36] = 0
    positions = mask.cumsum(1) - 1

    def last(cache: object) -> Tensor:
        model(ids[:, :36], attention_mask=mask[:, :36], position_ids=positions[:, :36], past_key_values=cache)
        new = {"attention_mask": mask, "position_ids": positions[:, 36:], "past_key_values": cache}
        logits: Tensor = model(ids[:, 36:], **new).logits
        return logits

    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 36:]
        torch.testing.assert_close(last(sa_hf.sparse_cache(model)), whole, rtol=0, atol=TOLERANCE)
        with pytest.raises(SparseAttentionError, match="row 1: the model's window reaches back to slot"):
            last(tf.DynamicCache(config=model.config))


@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution", "routing", "three"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "sparse"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_a_cache_can_be_copied_and_saved(way: str, kind: str, pattern: str) -> None:
    model = patched("llama", pattern)
    ids = tokens(2, 20)
    cache = tf.DynamicCache() if kind == "dynamic" else tf.StaticCache(config=model.config, max_cache_len=32)
    cache = sa_hf.sparse_cache(model) if kind == "sparse" else cache
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        if way == "torch.save":
            torch.save(cache, buffer := io.BytesIO())
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        else:
            copied = copy.deepcopy(cache) if way == "deepcopy" else pickle.loads(pickle.dumps(cache))
        model(ids[:, 12:13], past_key_values=cache)  # leaves the copy alone
        steps = [model(ids[:, 12:15], past_key_values=copied).logits, model(ids[:, 15:], past_key_values=copied).logits]
        whole = model(ids, use_cache=False).logits
    assert (torch.cat(steps, 1) - whole[:, 12:]).abs().max() < TOLERANCE


def with_prefix(model: object, prefix: int = 4) -> object:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("pattern", ["expire_span", "convolution", "routing", "three"])
def test_prefix_tuning_with_a_state_per_token_raises_by_name(pattern: str) -> None:
    model = with_prefix(patched("llama", pattern))
    with (
        torch.no_grad(),
        pytest.raises(SparseAttentionError, match=r"4 tokens without .*prefix tuning.*sliding_window"),
    ):
        model(input_ids=tokens(2, 8), attention_mask=torch.ones(2, 8, dtype=torch.long))


@pytest.mark.parametrize("masked", [False, True])
def test_prefix_tuning_under_static_patterns(masked: bool) -> None:
    """The prefix counts as the first tokens; a window that covers it and the prompt is the dense model."""
    model = with_prefix(tiny_model("llama"))
    inputs = {"input_ids": tokens(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    if masked:
        inputs["attention_mask"][1, :5] = 0
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**inputs).logits
        sa_hf.patch_model(model, "sliding_window", window=16)
        assert (model(**inputs).logits - dense)[real].abs().max() < TOLERANCE
        sa_hf.patch_model(model, "sliding_window", window=3)
        narrow = model(**inputs).logits
        assert (narrow - dense)[real].abs().max() > 0.1
        sa_hf.patch_model(model, "sliding_window", window=3, num_sink_tokens=4)  # the prefix is what all read
        assert (model(**inputs).logits - narrow)[real].abs().max() > 0.1


@pytest.mark.parametrize("pattern", ["block_topk", "chosen_by_query"])
def test_a_cropped_cache_pools_its_keys_anew(pattern: str) -> None:
    """After a crop other tokens follow: what was pooled of the old ones must not be chosen by."""
    model = patched("llama", pattern)
    ids, others = tokens(2, 40), tokens(2, 40).flip(1)
    cache = tf.DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-26)
        rest = torch.cat([ids[:, :14], others[:, :20]], dim=1)
        steps = [model(rest[:, a:b], past_key_values=cache).logits for a, b in ((14, 25), (25, 26), (26, 34))]
        whole = model(rest, use_cache=False).logits
    assert (torch.cat(steps, 1) - whole[:, 14:]).abs().max() < TOLERANCE
