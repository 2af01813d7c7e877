"""Attention sinks: models whose softmax has one logit a head more, against their own eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import SIZES, TOKENS, check_against_eager, eager_under_its_pattern, ragged, scattered
from generation_cases import check, generate, prompt
from hf_cases import tokens

import sa_hf
from sa_hf import SparseAttentionError

WINDOW = 24  # of the first layer's own
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=30, ramp=7, initial_span=12)
PATTERNS: dict[str, Any] = {
    "window": sa_hf.SlidingWindowAttentionConfig(window=9, num_sink_tokens=2),
    "bigbird": sa_hf.BigBirdAttentionConfig(
        block_size=16, num_random_blocks=1, num_window_blocks=1, num_global_blocks=1, global_blocks="first"
    ),
    "longnet": sa_hf.LongNetAttentionConfig(segment_length=(8, 16), dilated_ratio=(1, 2)),
    "logsparse": sa_hf.LogSparseAttentionConfig(local_window=2, restart_length=16),
    "fixed": sa_hf.SparseTransformerAttentionConfig(stride=8, summary=2, head_mode="per_head"),
    "expire_span": EXPIRING,
    "routing": sa_hf.RoutingAttentionConfig(num_clusters=3, window=6),
    "sparsebert": sa_hf.SparseBertAttentionConfig(mask_length=64),
    "frozen": sa_hf.SparseBertAttentionConfig(mask_length=64),
    "by heads": {"heads": {"0-1": "bigbird", "2": EXPIRING, "3": sa_hf.SlidingWindowAttentionConfig(window=5)}},
}


def gpt_oss(**changed: Any) -> Any:
    config = tf.GptOssConfig(
        **SIZES, **TOKENS, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=WINDOW, rope_parameters=PLAIN_ROPE, **changed,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.GptOssForCausalLM(config).eval()


def patched(pattern: str, make: Any = gpt_oss) -> Any:
    if make is granite and not hasattr(tf, "GraniteSWAConfig"):
        pytest.skip(f"transformers {tf.__version__} has no GraniteSWA")
    model = scattered(sa_hf.patch_model(make(), PATTERNS[pattern]))
    return sa_hf.freeze_masks(model) or model if pattern == "frozen" else model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_is_the_eager_attention_under_its_pairs(pattern: str, side: str) -> None:
    model = patched(pattern)
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    ours = check_against_eager(model, *ragged(side), limit=1e-4)
    assert all(ours[f"model.layers.{layer}.self_attn.sinks"].abs().min() > 1e-4 for layer in (0, 1))
    assert ours["model.embed_tokens.weight"].abs().max() > 1e-2


@pytest.mark.parametrize("pattern", ["window", "expire_span"])
def test_double_precision(pattern: str) -> None:
    check_against_eager(patched(pattern, granite).double(), *ragged("left"), limit=1e-5)


def test_packed_sequences_have_a_sink_each() -> None:
    model = patched("window")
    ids = tokens(1, 40)
    cuts = torch.tensor([[0] * 23 + [1] * 17])
    with torch.no_grad():
        positions = torch.cat([torch.arange(23), torch.arange(17)])[None]
        packed = model(input_ids=ids, position_ids=positions, sequence_ids=cuts, use_cache=False).logits
        apart = [model(input_ids=x, use_cache=False).logits for x in (ids[:, :23], ids[:, 23:])]
    assert (packed - torch.cat(apart, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("cache", ["dynamic", "static", "sparse"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation(pattern: str, cache: str) -> None:
    model = patched(pattern)
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    if cache == "sparse":
        options["past_key_values"] = sa_hf.sparse_cache(model)
    check(model, **options)


def test_generation_is_that_of_the_eager_model() -> None:
    """Steps of decoding against the original attention, which knows the sinks by itself."""
    model = patched("window")
    ids, mask = prompt()
    made = generate(model, ids[:1], mask[:1])
    whole = made.sequences[:, :-1]
    with eager_under_its_pattern(model, torch.ones_like(whole)), torch.no_grad():
        expected = model(input_ids=whole, use_cache=False).logits[:, -len(made.logits) :]
    assert (torch.stack(made.logits, 1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("pattern", ["window", "expire_span", "by heads"])
def test_saved_and_reloaded(pattern: str, tmp_path: Path) -> None:
    model = patched(pattern)
    ids, mask = ragged("right")
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_a_training_step_moves_the_sinks_with_and_without_checkpointing() -> None:
    moved = []
    for checkpointed in (False, True):
        model = patched("bigbird", lambda: gpt_oss(attention_dropout=0.1)).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        ids, mask = ragged("right")
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        moved.append(torch.stack([layer.self_attn.sinks.grad for layer in model.model.layers]))
    assert moved[0].abs().min() > 0
    assert torch.equal(*moved)


def test_one_graph_under_compile() -> None:
    torch._dynamo.reset()
    model = patched("window")
    ids, mask = ragged("right")
    compiled = torch.compile(model.model, backend="aot_eager")
    outs = []
    for run in (model.model, compiled):
        out = run(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
        sinks = [layer.self_attn.sinks for layer in model.model.layers]
        outs.append((out.detach(), *torch.autograd.grad(out.square().sum(), sinks)))
    for ours, expected in zip(outs[1], outs[0], strict=True):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_dense_layers_are_the_original() -> None:
    model = scattered(gpt_oss())
    ids, mask = ragged("right")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        sa_hf.patch_model(model, "dense")
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


# -- the other families --------------------------------------------------------------------------------------------


def granite(**changed: Any) -> Any:
    return tf.GraniteSWAForCausalLM(
        tf.GraniteSWAConfig(**SIZES, **TOKENS, num_key_value_heads=2, sliding_window=WINDOW, **changed)
    ).eval()


def granite_moe() -> Any:
    return tf.GraniteMoeSWAForCausalLM(
        tf.GraniteMoeSWAConfig(
            **SIZES, **TOKENS, num_key_value_heads=2, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
        )
    ).eval()


def mimo() -> Any:
    """Sinks, and values of another width than the keys, in its sliding layers alone."""
    return tf.MiMoV2FlashForCausalLM(
        tf.MiMoV2FlashConfig(
            **SIZES, **TOKENS, num_key_value_heads=2, head_dim=16, v_head_dim=8, swa_num_attention_heads=4,
            swa_num_key_value_heads=4, swa_head_dim=16, swa_v_head_dim=8, sliding_window=WINDOW, n_routed_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, layer_types=["full_attention", "sliding_attention"],
        )
    ).eval()  # fmt: skip


def flint() -> Any:
    return tf.FlintForCausalLM(
        tf.FlintConfig(**SIZES, **TOKENS, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW)
    ).eval()


OTHERS = {"GraniteSWA": granite, "GraniteMoeSWA": granite_moe, "MiMoV2Flash": mimo, "Flint": flint}


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("pattern", ["window", "bigbird", "expire_span"])
def test_other_families(family: str, pattern: str, tmp_path: Path) -> None:
    if not hasattr(tf, f"{family}Config"):
        pytest.skip(f"transformers {tf.__version__} has no {family}")
    model = patched(pattern, OTHERS[family])
    for side in ("right", "left"):
        check_against_eager(model, *ragged(side), limit=1e-4)
    check(model)
    check(model, past_key_values=sa_hf.sparse_cache(model))


def privacy_filter() -> Any:
    return tf.OpenAIPrivacyFilterForTokenClassification(
        tf.OpenAIPrivacyFilterConfig(
            **SIZES, **TOKENS, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=12, num_labels=5,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", ["window", "bigbird", "sparsebert"])
def test_a_bidirectional_model(name: str) -> None:
    if not hasattr(tf, "OpenAIPrivacyFilterConfig"):
        pytest.skip(f"transformers {tf.__version__} has no privacy filter")
    model = patched(name, privacy_filter)
    for side in ("right", "left"):
        check_against_eager(model, *ragged(side), limit=1e-4)
    dense = scattered(privacy_filter())
    with pytest.raises(SparseAttentionError, match=r"attention sinks of layer 0.*'bigbird'"):
        sa_hf.patch_model(dense, "routing", num_clusters=3)
    assert not any("sparse" in module for module, _ in dense.named_modules())


@pytest.mark.parametrize("pattern", ["block_topk", "star", "routing", "expire_span", "sparse_transformer"])
def test_a_pattern_that_reads_everything_is_the_dense_model(pattern: str) -> None:
    covering: dict[str, dict[str, Any]] = {
        "block_topk": {"block_size": 4, "top_k": 30}, "star": {}, "routing": {"num_clusters": 1, "window": 200},
        "expire_span": {"max_span": 500, "initial_span": 400}, "sparse_transformer": {"stride": 100},
    }  # fmt: skip
    model = scattered(gpt_oss(layer_types=["full_attention"] * 2))
    ids, mask = ragged("left")
    with torch.no_grad():
        dense = model(ids, attention_mask=mask).logits[mask.bool()]
        sa_hf.patch_model(model, pattern, **covering[pattern])
        sparse = model(ids, attention_mask=mask).logits[mask.bool()]
    close = (sparse - dense).abs().max() < 1e-4 * dense.abs().max()
    assert close == (pattern != "star")
