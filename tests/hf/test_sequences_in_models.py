"""Padding, packing, causality: what a token sees never depends on what stands around its sequence."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import CONFIGS, DECODERS, ENCODERS, VOCABULARY, case, error, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError, UnsupportedModelError

PATTERNS: dict[str, Any] = {
    "window": sa_hf.SlidingWindowAttentionConfig(window=3, num_sink_tokens=1),
    "bigbird": sa_hf.BigBirdAttentionConfig(block_size=16, num_random_blocks=1, num_window_blocks=1),
    "mixture": {"0": {"heads": {"0-1": "star", "2-": sa_hf.LogSparseAttentionConfig()}}},
}


def run(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, **inputs)[0]
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", DECODERS)
def test_changing_a_token_changes_nothing_before_it(family: str, pattern: str) -> None:
    model = tiny_model(family)
    sa_hf.patch_model(model, PATTERNS[pattern])
    ids = tokens(1, 40)
    base = run(model, ids)
    for at in (1, 17, 39):
        changed = ids.clone()
        changed[0, at] = (ids[0, at] - 2) % (VOCABULARY - 3) + 3
        out = run(model, changed)
        assert torch.equal(out[:, :at], base[:, :at])
        assert not torch.equal(out[:, at], base[:, at])


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "modernbert", "roberta"])
def test_a_padded_row_equals_the_row_alone(family: str, side: str) -> None:
    model = tiny_model(family)
    sa_hf.patch_model(model, PATTERNS["window"])
    n, total = 23, 30
    row = tokens(1, n)
    where = {"left": range(total - n, total), "right": range(n), "inside": [*range(9), *range(16, total)]}[side]
    ids = torch.zeros(2, total, dtype=torch.long)
    ids[0], ids[1, list(where)] = tokens(total, seed=4), row[0]
    mask = torch.zeros(2, total, dtype=torch.long)
    mask[0], mask[1, list(where)] = 1, 1
    # RoBERTa numbers its positions by its own padding token; the others take them.
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + (2 if family == "roberta" else 0)
    padded = run(model, ids, attention_mask=mask, position_ids=positions)
    alone = run(model, row, position_ids=torch.arange(n)[None] + (2 if family == "roberta" else 0))
    assert error(padded[1, list(where)], alone[0]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens", "sequence_ids", "position_ids with a cache"])
def test_packed_rows_of_decoders(family: str, told_by: str) -> None:
    model = tiny_model(family)
    sa_hf.patch_model(model, PATTERNS["window"])
    lengths = (7, 1, 12)
    rows = [tokens(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs: dict[str, Any] = {"position_ids": positions, "use_cache": told_by.endswith("cache")}
    if told_by == "cu_seq_lens":
        ends = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    elif told_by == "sequence_ids":
        inputs["sequence_ids"] = torch.tensor([[4] * 7 + [2] + [4] * 12])
    packed = run(model, torch.cat(rows, dim=1), **inputs)
    alone = torch.cat([run(model, row) for row in rows], dim=1)
    assert error(packed, alone) < 1e-5


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens_q", "sequence_ids"])
@pytest.mark.parametrize("cached", [False, True])
def test_layers_left_dense_see_the_same_sequences(told_by: str, cached: bool) -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, PATTERNS["window"], layers="0")
    rows = [tokens(1, n, seed=n) for n in (7, 13)]
    given: dict[str, Any] = {"position_ids": torch.cat([torch.arange(7), torch.arange(13)])[None], "use_cache": cached}
    if told_by == "cu_seq_lens_q":
        given[told_by] = torch.tensor([0, 7, 20], dtype=torch.int32)
    if told_by == "sequence_ids":
        given[told_by] = torch.tensor([[4] * 7 + [2] * 13])
    alone = torch.cat([run(model, row) for row in rows], dim=1)
    assert error(run(model, torch.cat(rows, dim=1), **given), alone) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_left_dense_see_packed_rows_with_padding_inside(implementation: str) -> None:
    """Padding is cut out before neighbours are compared: [1, 1, pad, 1, 2, 1] are three sequences."""
    model = tiny_model("bert", _attn_implementation=implementation)
    sa_hf.patch_model(model, PATTERNS["window"], layers="0")
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    sequences = torch.tensor([[1, 1, 9, 1, 2, 1]])
    positions = torch.tensor([[0, 1, 0, 2, 0, 0]])
    ids = tokens(1, 6)
    packed = run(model, ids, attention_mask=mask, sequence_ids=sequences, position_ids=positions)
    for at in ([0, 1, 3], [4], [5]):
        assert error(packed[:, at], run(model, ids[:, at])) < 1e-5


def test_sequence_ids_of_the_wrong_shape_raise_in_dense_layers_too() -> None:
    model = tiny_model("bert")
    sa_hf.patch_model(model, "dense")
    with pytest.raises(SparseAttentionError, match=r"\[1, 9\]"):
        run(model, tokens(1, 9), sequence_ids=torch.zeros(1, 8, dtype=torch.long))


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("gemma2", "eager"), *((f, i) for f in ("llama", "gpt2", "bert", "modernbert") for i in ("sdpa", "eager"))],
)
def test_sequence_ids_inside_dense(family: str, implementation: str) -> None:
    model = tiny_model(family, _attn_implementation=implementation)
    rows = [tokens(1, n, seed=n) for n in (7, 13)]
    positions = [torch.arange(n)[None] for n in (7, 13)]
    with torch.no_grad():
        alone = torch.cat([run(model, row, position_ids=at) for row, at in zip(rows, positions, strict=True)], dim=1)
        mixed = run(model, torch.cat(rows, dim=1))
    sa_hf.patch_model(model, PATTERNS["window"], layers="0")
    joined = torch.cat([*rows, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    given = {
        "attention_mask": torch.tensor([[1] * 20 + [0] * 2]),
        "position_ids": torch.cat([*positions, torch.zeros(1, 2, dtype=torch.long)], dim=1),
        "sequence_ids": torch.tensor([[4] * 7 + [2] * 15]),
    }
    with sa_hf.dense(model):
        assert error(run(model, joined, **given)[:, :20], alone) < 1e-5
        assert error(run(model, torch.cat(rows, dim=1)), mixed) < 1e-6  # and nothing of it stays
        assert model.config._attn_implementation == implementation
        with pytest.raises(SparseAttentionError, match=r"\[1, 22\]"):
            run(model, joined, **{**given, "sequence_ids": given["sequence_ids"][:, :5]})
        assert model.config._attn_implementation == implementation
        with pytest.raises(SparseAttentionError, match="2-D"):
            run(model, joined, **{**given, "attention_mask": torch.ones(1, 1, 22, 22)})


def test_sequence_ids_inside_dense_raise_where_they_would_be_dropped() -> None:
    ids, sequences = tokens(1, 9), torch.tensor([[1] * 4 + [2] * 5])
    flash = sa_hf.patch_model(tiny_model("llama"), PATTERNS["window"])
    flash.sa_hf_patch.configs[:] = [(config, "flash_attention_2") for config, _ in flash.sa_hf_patch.configs]
    with sa_hf.dense(flash), pytest.raises(SparseAttentionError, match=r"flash_attention_2.*sdpa"):
        run(flash, ids, sequence_ids=sequences)
    both = sa_hf.patch_model(tiny_model("t5"), PATTERNS["window"])
    with sa_hf.dense(both), pytest.raises(SparseAttentionError, match="cross-attention"):
        run(both, ids, sequence_ids=sequences, decoder_input_ids=ids)


def test_sequence_ids_beside_cross_attention_raise() -> None:
    c = case("t5")
    sa_hf.patch_model(c.model, PATTERNS["window"])
    with pytest.raises(SparseAttentionError, match="cross-attention"):
        c.output(sequence_ids=torch.zeros(3, 20, dtype=torch.long))


@pytest.mark.parametrize("family", ENCODERS)
def test_packed_rows_of_encoders_by_sequence_ids(family: str) -> None:
    model = tiny_model(family)
    sa_hf.patch_model(model, PATTERNS["window"])
    first = 2 if "roberta" in family else 0
    rows = [tokens(1, n, seed=n) for n in (6, 10)]
    ids = torch.tensor([[1] * 6 + [2] * 10 + [0] * 4])
    mask = torch.tensor([[1] * 16 + [0] * 4])
    inputs: dict[str, Any] = {}
    if family != "distilbert":  # takes no positions
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (6, 10, 4)])[None] + first
    joined = torch.cat([*rows, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    packed = run(model, joined, attention_mask=mask, sequence_ids=ids, **inputs)
    if family == "distilbert":
        swapped = joined.clone()
        swapped[0, 8] = 50
        changed = run(model, swapped, attention_mask=mask, sequence_ids=ids)
        assert torch.equal(changed[:, :6], packed[:, :6])
        assert not torch.equal(changed[:, 6:16], packed[:, 6:16])
        return
    at = {n: {"position_ids": torch.arange(n)[None] + first} for n in (6, 10)}
    alone = torch.cat([run(model, row, **at[row.shape[1]]) for row in rows], dim=1)
    assert error(packed[:, :16], alone) < 1e-5


def test_the_same_input_gives_the_same_output_whatever_came_before() -> None:
    model = tiny_model("bert")
    sa_hf.patch_model(model, PATTERNS["bigbird"])
    ids = tokens(2, 48)
    first = run(model, ids)
    run(model, tokens(1, 5)), run(model, ids, attention_mask=torch.ones_like(ids).tril(20))
    assert torch.equal(run(model, ids), first)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_masks_that_cannot_be_kept_raise(family: str) -> None:
    c = case(family)
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    n = c.inputs["input_ids"].shape[1]
    with pytest.raises(SparseAttentionError, match=r"2-D"):
        c.output(attention_mask=torch.ones(3, 1, n, n))
    with pytest.raises(SparseAttentionError, match=r"reached|2-D"):
        c.output(attention_mask=torch.ones(3, 3, n))
    c.output()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("layers", ["0-", "1"], ids=["sparse", "a dense layer"])
def test_a_gap_in_the_positions_cuts_where_transformers_cuts_it(use_cache: bool, layers: str) -> None:
    model = tiny_model("llama")
    positions = torch.cat([torch.arange(7), torch.arange(13) + 20])[None]
    inputs = {"input_ids": tokens(1, 20), "position_ids": positions, "use_cache": use_cache}
    with torch.no_grad():
        dense = model(**inputs).logits
        sa_hf.patch_model(model, {layers: sa_hf.SlidingWindowAttentionConfig(window=1000)})
        assert error(model(**inputs).logits, dense) < 1e-5


def test_unions_of_masks_raise() -> None:
    from transformers.masking_utils import create_causal_mask

    c = case("llama")
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    embeds = c.model.get_input_embeddings()(c.inputs["input_ids"])
    taken = inspect.signature(create_causal_mask).parameters
    nothing = {name: None for name in ("cache", "past_key_values") if name in taken}
    union = {"or_mask_function": lambda b, h, q, k: q == k}
    mask = create_causal_mask(c.model.config, embeds, attention_mask=None, **nothing, **union)
    with pytest.raises(UnsupportedModelError, match="union"):
        c.output(attention_mask=mask)


def test_what_would_be_dropped_raises() -> None:
    c = case("llama")
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    with pytest.raises(SparseAttentionError, match="output_attentions"):
        c.output(output_attentions=True)
    with pytest.raises(SparseAttentionError, match="'s_aux'"):
        c.output(s_aux=torch.zeros(4))
    with pytest.raises(SparseAttentionError, match="columns"):
        c.output(attention_mask=torch.ones(3, 7, dtype=torch.long))
    c.model.config.output_attentions = False
    c.output(output_hidden_states=True, logits_to_keep=0)


def test_a_model_without_its_patterns_raises() -> None:
    """The config of a patched model does not let another model run dense in silence."""
    patched = tiny_model("llama")
    sa_hf.patch_model(patched, "sliding_window", window=3)
    other = tiny_model("llama")
    other.config._attn_implementation = patched.config._attn_implementation
    with pytest.raises(SparseAttentionError, match="carries no pattern"):
        run(other, tokens(1, 5))


def test_the_keyword_makes_a_call_bidirectional() -> None:
    model = tiny_model("llama")
    ids = tokens(1, 20)
    causal, both = run(model, ids, use_cache=False), run(model, ids, use_cache=False, is_causal=False)
    sa_hf.patch_model(model, "sliding_window", window=1000)
    assert error(run(model, ids, use_cache=False, is_causal=False), both) < 1e-5
    assert error(run(model, ids, use_cache=False), causal) < 1e-5
    assert error(causal, both) > 1e-2


def test_bidirectional_decoders_are_encoders() -> None:
    c = case("llama")
    c.model.config.is_causal = False
    dense = c.output()
    sa_hf.patch_model(c.model, "sliding_window", window=1000)
    assert list(c.model.sa_hf_patch.sites.stacks) == ["encoder"]
    assert error(c.output(), dense) < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_attention_dropout_acts_in_training_only(family: str) -> None:
    name = {"bert": "attention_probs_dropout_prob", "llama": "attention_dropout", "t5": "dropout_rate"}[family]
    c = case(family, **{name: 0.5})
    if family == "bert":
        c.model.config.hidden_dropout_prob = 0.0
    sa_hf.patch_model(c.model, "sliding_window", window=5)
    evaluated = c.output()
    assert torch.equal(c.output(), evaluated)
    c.model.train()
    torch.manual_seed(1)
    first = c.output()
    assert not torch.equal(first, c.output())
    torch.manual_seed(1)
    assert torch.equal(c.output(), first)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_past_on_an_encoder_raises(family: str, masked: bool) -> None:
    """They hand a cache to their attention as encoders, too, and the pattern would miss the last keys."""
    model = sa_hf.patch_model(tiny_model(family), "sliding_window", window=1000)
    cache = tf.DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8), layer)
    mask = torch.ones(1, 11, dtype=torch.long) if masked else None
    with torch.no_grad(), pytest.raises(SparseAttentionError, match=r"11 keys.*8 tokens.*bidirectional stack"):
        model(tokens(1, 8), attention_mask=mask, past_key_values=cache)


def test_a_prefix_of_keys_on_an_encoder_raises() -> None:
    """What prefix tuning hands to an encoder (PEFT itself, up to 0.21.2, cannot on transformers 5.24)."""
    model = sa_hf.patch_model(tf.BertModel(CONFIGS["bert"]()).eval(), "sliding_window", window=1000)
    cache = tf.DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(2, 4, 4, 8), torch.zeros(2, 4, 4, 8), layer)
    inputs = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    with torch.no_grad(), pytest.raises(SparseAttentionError, match=r"12 keys.*8 tokens.*prefix tuning"):
        model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_mask_that_is_wider_than_the_input_of_an_encoder_raises(family: str) -> None:
    model = sa_hf.patch_model(tiny_model(family), "sliding_window", window=3)
    with torch.no_grad(), pytest.raises(SparseAttentionError, match=r"10 keys.*\[batch, 8\]"):
        model(tokens(1, 8), attention_mask=torch.ones(1, 10, dtype=torch.long))


def test_sequence_ids_that_are_no_tensor_raise() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), "star")
    with pytest.raises(SparseAttentionError, match=r"is a list; it must be a tensor \[batch, length\] = \[1, 4\]"):
        model(tokens(1, 4), sequence_ids=[[0, 0, 1, 1]])
