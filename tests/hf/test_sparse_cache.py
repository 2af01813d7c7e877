"""The cache that keeps only what a pattern can still read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as tf
from generation_cases import EXPIRING, LOSSLESS, PATTERNS, TOLERANCE, generate, patched, prompt
from hf_cases import VOCABULARY, roughened, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.hf.caches import sparse


@pytest.fixture(autouse=True)
def dropped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches here are so small that they would look for what they can drop at no step."""
    monkeypatch.setattr(sparse, "LEAST_EVICTED", 1)


@pytest.mark.parametrize("pattern", LOSSLESS)
@pytest.mark.parametrize("beams", [1, 2])
def test_sparse_cache_is_lossless(pattern: str, beams: int) -> None:
    model = patched("llama", pattern)
    ids, mask = prompt()
    options = {"max_new_tokens": 45, "min_new_tokens": 45, "num_beams": beams}
    arguments = {
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    full = model.generate(ids, attention_mask=mask, **arguments)
    cache = sa_hf.sparse_cache(model)
    kept = model.generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
    assert torch.equal(full.sequences, kept.sequences)
    assert (torch.stack(full.logits) - torch.stack(kept.logits)).abs().max() < TOLERANCE
    seen = ids.shape[1] + 44
    for row in cache.report().values():
        assert row["seen"] == seen
        if pattern in ("window", "longnet", "star", "expire_span", "fixed"):
            assert row["kept"] < seen / 2
        if pattern in ("logsparse", "convolution"):
            assert row["kept"] == seen  # some later query is a power of two away from every key


@pytest.mark.parametrize("family", ["mistral", "t5"])
def test_sparse_cache_of_other_models(family: str) -> None:
    model = patched(family, "window")
    ids, mask = prompt()
    cache = sa_hf.sparse_cache(model)
    out = generate(model, ids, mask, past_key_values=cache)
    assert torch.equal(out.sequences, generate(model, ids, mask).sequences)
    assert all(row["kept"] < row["seen"] for row in cache.report().values())


def test_a_step_reads_the_kept_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_hf.ops.cpp.steps import PreparedStep

    lengths: list[int] = []
    run = PreparedStep.run

    def recorded(self: PreparedStep, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        lengths.append(key.shape[2])
        return run(self, query, key, *rest)

    monkeypatch.setattr(PreparedStep, "run", recorded)
    model = tiny_model("llama")
    sa_hf.patch_model(model, {"0": "star", "1": {"heads": {"0-1": "star", "2-": PATTERNS["window"]}}})
    ids, mask = prompt()
    out = generate(model, ids, mask, past_key_values=sa_hf.sparse_cache(model))
    assert max(lengths) < 10
    assert torch.equal(out.sequences, generate(model, ids, mask).sequences)


def test_keys_are_dropped_sixteen_steps_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "LEAST_EVICTED", 16)
    model = tiny_model("llama")
    sa_hf.patch_model(model, "star")
    cache, held = sa_hf.sparse_cache(model), []
    for begin, end in [(0, 20), *((at, at + 1) for at in range(20, 60))]:
        with torch.no_grad():
            model(tokens(1, 60)[:, begin:end], past_key_values=cache)
        held.append(cache.report()[0]["kept"])
    assert held[0] == 2  # the first and the last
    assert held[1:16] == list(range(3, 18))
    assert held[16] == held[32] == 2


def test_sparse_cache_keeps_dense_layers_whole_and_refuses_to_be_cropped() -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, "sliding_window", window=4, layers="0")
    ids, mask = prompt()
    cache = sa_hf.sparse_cache(model)
    out = generate(model, ids, mask, past_key_values=cache)
    assert torch.equal(out.sequences, generate(model, ids, mask).sequences)
    report = cache.report()
    assert report[0]["pattern"] == "sliding_window"
    assert report[0]["kept"] == 3  # the next query reads itself and three before it
    assert (report[1]["pattern"], report[1]["kept"]) == ("dense", report[1]["seen"])
    assert report[0]["bytes"] < report[1]["bytes"]
    with pytest.raises(SparseAttentionError, match="cropped"):
        cache.layers[0].crop(-1)
    cache.reset()
    assert cache.report()[0]["seen"] == cache.report()[0]["kept"] == 0


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("reader", ["dense", "unpatched", "wider", "narrower", "layer left dense"])
def test_a_cache_that_dropped_keys_serves_no_other_pattern(reader: str, new: int) -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, "sliding_window", window=4)
    ids = tokens(1, 20)
    cache = sa_hf.sparse_cache(model)

    def step(begin: int, end: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(ids[:, begin:end], past_key_values=cache).logits
        return out

    step(0, 15)
    assert cache.report()[0]["kept"] == 3
    match = r"holds 3 of 15 keys.*start again from the prompt"
    if reader == "dense":
        with sa_hf.dense(model), pytest.raises(SparseAttentionError, match=match):
            step(15, 15 + new)
        with torch.no_grad():  # refused before anything changed, so its own pattern goes on
            assert torch.allclose(step(15, 20), model(ids).logits[:, 15:], atol=1e-4)
        return
    if reader == "unpatched":
        sa_hf.unpatch_model(model)
    elif reader == "layer left dense":
        sa_hf.patch_model(model, "sliding_window", window=4, layers="1")
    else:
        sa_hf.patch_model(model, "sliding_window", window=9 if reader == "wider" else 2)
    with pytest.raises(SparseAttentionError, match=match):
        step(15, 15 + new)
    cache.reset()
    step(0, 3)


def test_a_cache_that_dropped_nothing_serves_any_attention() -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, "sliding_window", window=30)
    ids = tokens(1, 20)
    cache = sa_hf.sparse_cache(model)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
        with sa_hf.dense(model):
            last = model(ids[:, 15:], past_key_values=cache).logits
        assert torch.allclose(last, model(ids).logits[:, 15:], atol=1e-4)


def sharing_model() -> Any:
    """Layers 3 to 5 read the keys of layers 1 (full attention) and 2 (its own window)."""
    config = tf.Gemma3nTextConfig(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, max_position_embeddings=64,
        hidden_size_per_layer_input=8, num_kv_shared_layers=3, sliding_window=8, laurel_rank=4, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"] * 3, activation_sparsity_pattern=[0.0] * 6,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return roughened(tf.Gemma3nForCausalLM(config))


def in_steps(model: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        cuts = [0, 10, 11, 12, 16, ids.shape[1]]
        return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(cuts)], 1)


NARROW, WIDER = (sa_hf.SlidingWindowAttentionConfig(window=window) for window in (3, 7))


@pytest.mark.parametrize(
    "pattern",
    [{"0-": NARROW}, {"0-2": NARROW, "3-": WIDER}, {"0-2": NARROW}, {"3-": NARROW}, {"0-": "star"}, {"1": NARROW}],
    ids=["one", "readers wider", "readers dense", "donors dense", "star", "one donor"],
)
def test_keys_that_layers_share_stay_for_every_reader(pattern: Any) -> None:
    model = sharing_model()
    sa_hf.patch_model(model, pattern)
    ids = tokens(2, 20)
    cache = sa_hf.sparse_cache(model)
    expected = in_steps(model, ids, tf.DynamicCache(config=model.config))
    assert (in_steps(model, ids, cache) - expected).abs().max() < TOLERANCE
    report = cache.report()
    assert [report[donor]["kept"] for donor in (1, 2)] == [20, 20]
    if 0 in model.sa_hf_patch.assignment["decoder"]:
        assert report[0]["kept"] < 5
    ids, mask = prompt()
    kept = generate(model, ids, mask, past_key_values=sa_hf.sparse_cache(model))
    assert torch.equal(kept.sequences, generate(model, ids, mask).sequences)


@pytest.mark.parametrize("kind", ["dynamic", "sparse"])
def test_a_pattern_with_state_raises_where_it_reads_the_keys_of_another_layer(kind: str) -> None:
    model = sharing_model()
    sa_hf.patch_model(model, EXPIRING)
    cache = sa_hf.sparse_cache(model) if kind == "sparse" else tf.DynamicCache(config=model.config)
    with pytest.raises(SparseAttentionError, match=r"layer 3 reads the keys of another.*static pattern"):
        in_steps(model, tokens(2, 20), cache)


def test_layers_that_share_keys_in_another_way_raise() -> None:
    """Sharing that no attribute shows: the layer's keys do not pass through its place in the cache."""
    model = sharing_model()
    sa_hf.patch_model(model, "sliding_window", window=3)
    cache = sa_hf.sparse_cache(model)
    cache.layers[3] = type(cache.layers[0])()
    with pytest.raises(SparseAttentionError, match=r"layer 3 reads keys that did not pass through its place"):
        in_steps(model, tokens(2, 20), cache)


def test_sparse_cache_needs_a_patched_decoder() -> None:
    model = tiny_model("bert")
    with pytest.raises(SparseAttentionError, match="not patched"):
        sa_hf.sparse_cache(model)
    sa_hf.patch_model(model, "star")
    with pytest.raises(SparseAttentionError, match="no causal layers"):
        sa_hf.sparse_cache(model)
