"""Generation: each step's logits are the row of the full causal forward, whatever the cache and the search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import BOTH, DECODERS, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError

NEW, PROMPT = 12, 15
TOLERANCE = 1e-4  # logits are of order 10

EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=8, ramp=3, initial_span=4)
PATTERNS: dict[str, Any] = {
    "window": sa_hf.SlidingWindowAttentionConfig(window=4, num_sink_tokens=2),
    "bigbird": sa_hf.BigBirdAttentionConfig(block_size=16, num_random_blocks=1, num_window_blocks=1),
    "longnet": sa_hf.LongNetAttentionConfig(segment_length=(4, 8), dilated_ratio=(1, 2)),
    "logsparse": sa_hf.LogSparseAttentionConfig(local_window=2, restart_length=8),
    "convolution": sa_hf.LogSparseAttentionConfig(conv_kernel_size=3),
    "fixed": sa_hf.SparseTransformerAttentionConfig(stride=4, summary=1, head_mode="per_head"),
    "star": sa_hf.StarAttentionConfig(),
    "expire_span": EXPIRING,
    "routing": sa_hf.RoutingAttentionConfig(num_clusters=3, window=4),
    "sparsebert": sa_hf.SparseBertAttentionConfig(mask_length=64),
    "three": {"0": {"heads": {"0-1": EXPIRING, "2": "star", "3": "dense"}}, "1": "bigbird"},
}
LOSSLESS = {name: pattern for name, pattern in PATTERNS.items() if name not in ("bigbird", "three")}


def patched(family: str, pattern: str) -> Any:
    model = tiny_model(family)
    config = PATTERNS[pattern]
    if family in BOTH:
        config = {"decoder": config}
    sa_hf.patch_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sparse." in name and not name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def prompt() -> tuple[Tensor, Tensor]:
    """Two rows, the second padded on the left."""
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :5] = 0
    return tokens(2, PROMPT), mask


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def full_rows(model: Any, ids: Tensor, mask: Tensor, sequences: Tensor) -> Tensor:
    """The logits that the full forward gives for each generated token, ``[batch, NEW, vocabulary]``."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
            return out[:, -NEW:]
        whole = torch.cat([mask, torch.ones(len(ids), NEW, dtype=torch.long)], dim=1)[:, :-1]
        inputs = {"input_ids": sequences[:, :-1], "attention_mask": whole, "use_cache": False}
        if not isinstance(model, tf.OPTForCausalLM):  # counts positions by the mask alone
            inputs["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)
        return model(**inputs).logits[:, -NEW:]


def check(model: Any, **options: Any) -> Any:
    ids, mask = prompt()
    out = generate(model, ids, mask, **options)
    expected = full_rows(model, ids, mask, out.sequences)
    assert (torch.stack(out.logits, 1) - expected).abs().max() < TOLERANCE
    return out


@pytest.mark.parametrize("family", [*DECODERS, *BOTH])
def test_greedy_steps_equal_the_full_forward(family: str) -> None:
    check(patched(family, "window"))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("pattern", ["bigbird", "fixed", "expire_span", "convolution"])
def test_positions_stay_true_where_the_models_own_cache_slides(family: str, pattern: str) -> None:
    check(patched(family, pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_decodes(pattern: str) -> None:
    check(patched("llama", pattern))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution"])
def test_static_cache(family: str, pattern: str) -> None:
    check(patched(family, pattern), cache_implementation="static")


@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution"])
def test_compiled_steps_do_not_compile_anew_for_each_token(pattern: str) -> None:
    """What `generate` does by itself with a static cache on a GPU."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    options = tf.CompileConfig(backend="eager")
    options._compile_all_devices = True
    model = patched("llama", pattern)
    check(model, cache_implementation="static", compile_config=options)
    assert counters["stats"]["unique_graphs"] <= 12  # of 11 compiled steps, several graphs each


def test_shared_queries_and_keys() -> None:
    model = tiny_model("gpt2")
    sa_hf.patch_model(model, "routing", num_clusters=3, window=4, shared_qk=True)
    check(model)
    check(model, cache_implementation="static")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral", "t5"])
@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution", "routing"])
def test_beams(family: str, pattern: str) -> None:
    if family == "t5" and pattern == "routing":
        pattern = "three"
    model = patched(family, pattern)
    ids, mask = prompt()
    cached = generate(model, ids, mask, num_beams=3, output_scores=True)
    plain = generate(model, ids, mask, num_beams=3, use_cache=False, output_scores=True)
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.allclose(cached.sequences_scores, plain.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution", "routing", "three"])
def test_prefill_in_chunks(pattern: str) -> None:
    check(patched("llama", pattern), prefill_chunk_size=4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution", "routing"])
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
    from sa_hf.patterns import static

    lengths: list[int] = []
    decode = static.decode_attention

    def recorded(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        lengths.append(key.shape[2])
        return decode(query, key, *rest)

    monkeypatch.setattr(static, "decode_attention", recorded)
    model = tiny_model("llama")
    sa_hf.patch_model(model, {"0": "star", "1": {"heads": {"0-1": "star", "2-": PATTERNS["window"]}}})
    ids, mask = prompt()
    out = generate(model, ids, mask, past_key_values=sa_hf.sparse_cache(model))
    assert max(lengths) < 10
    assert torch.equal(out.sequences, generate(model, ids, mask).sequences)


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


def test_sparse_cache_needs_a_patched_decoder() -> None:
    model = tiny_model("bert")
    with pytest.raises(SparseAttentionError, match="not patched"):
        sa_hf.sparse_cache(model)
    sa_hf.patch_model(model, "star")
    with pytest.raises(SparseAttentionError, match="no causal layers"):
        sa_hf.sparse_cache(model)


def test_a_cache_filled_before_patching_is_refused() -> None:
    model = tiny_model("llama")
    ids = tokens(1, 6)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        sa_hf.patch_model(model, EXPIRING)
        with pytest.raises(SparseAttentionError, match="filled by another model or before patching"):
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
