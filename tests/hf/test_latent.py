"""Latent attention: values of another width than the keys, a cache of latents; against the eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import SIZES, TOKENS, check_against_eager, ragged, scattered
from generation_cases import check
from hf_cases import tokens

import sa_hf
from sa_hf import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.caches import sparse
from sa_hf.hf.patching import probe

LATENT: dict[str, Any] = {
    **SIZES, **TOKENS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("DeepseekV2", {}),
    "v3": ("DeepseekV3", {}),
    "v3, whole queries": ("DeepseekV3", {"q_lora_rank": None}),
    "v3, wide values": ("DeepseekV3", {"v_head_dim": 40}),
}
PATTERNS: dict[str, Any] = {
    "window": sa_hf.SlidingWindowAttentionConfig(window=9, num_sink_tokens=2),
    "bigbird": sa_hf.BigBirdAttentionConfig(
        block_size=16, num_random_blocks=1, num_window_blocks=1, num_global_blocks=1, global_blocks="first"
    ),
    "longnet": sa_hf.LongNetAttentionConfig(segment_length=(8, 16), dilated_ratio=(1, 2)),
    "fixed": sa_hf.SparseTransformerAttentionConfig(stride=8, summary=2, head_mode="per_head"),
    "expire_span": sa_hf.ExpireSpanAttentionConfig(max_span=30, ramp=7, initial_span=12),
    "sparsebert": sa_hf.SparseBertAttentionConfig(mask_length=64),
    "frozen": sa_hf.SparseBertAttentionConfig(mask_length=64),
    "by heads": {"heads": {"0-1": "bigbird", "2": "expire_span", "3": sa_hf.SlidingWindowAttentionConfig(window=5)}},
}


def built(case: str) -> Any:
    family, fields = CASES[case]
    torch.manual_seed(0)
    return getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**{**LATENT, **fields})).eval()


def patched(case: str, pattern: str) -> Any:
    model = scattered(sa_hf.patch_model(built(case), PATTERNS[pattern]))
    return sa_hf.freeze_masks(model) or model if pattern == "frozen" else model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("case", "pattern"), [*(("v3", name) for name in PATTERNS), *((name, "window") for name in CASES if name != "v3")]
)
def test_it_is_the_eager_attention_under_the_patterns_pairs(case: str, pattern: str, side: str) -> None:
    ours = check_against_eager(patched(case, pattern), *ragged(side), limit=1e-4)
    assert ours["model.layers.0.self_attn.kv_b_proj.weight"].abs().max() > 1e-2


@pytest.mark.parametrize("cache", ["dynamic", "static", "sparse"])
@pytest.mark.parametrize(
    ("case", "pattern"), [*(("v3", name) for name in PATTERNS), *((name, "window") for name in CASES if name != "v3")]
)
def test_generation(case: str, pattern: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "LEAST_EVICTED", 1)
    model = patched(case, pattern)
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    if cache == "sparse":
        options["past_key_values"] = kept = sa_hf.sparse_cache(model)
    check(model, **options)
    if cache == "sparse" and pattern in ("window", "expire_span"):
        assert all(row["kept"] < row["seen"] for row in kept.report().values())


@pytest.mark.parametrize("case", ["v2", "v3"])
def test_saved_and_reloaded(case: str, tmp_path: Path) -> None:
    model = patched(case, "by heads")
    ids, mask = ragged("right")
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_training_with_and_without_checkpointing() -> None:
    found = []
    for checkpointed in (False, True):
        model = patched("v3", "by heads").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        ids, mask = ragged("right")
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_graph_under_compile() -> None:
    torch._dynamo.reset()
    model = patched("v3", "window")
    ids, mask = ragged("right")
    compiled = torch.compile(model.model, backend="aot_eager")
    with torch.no_grad():
        ours, plain = (
            run(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
            for run in (compiled, model.model)
        )
    assert (ours - plain).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (sa_hf.RoutingAttentionConfig(num_clusters=3), "apply_rotary"),
        (sa_hf.LogSparseAttentionConfig(conv_kernel_size=3), "no projection of queries and keys"),
    ],
    ids=["routing", "convolution"],
)
@pytest.mark.parametrize("case", CASES)
def test_what_needs_plain_projections_is_refused(case: str, pattern: Any, reason: str) -> None:
    """Keys are made of a latent and of a turned part: no convolution joins them, no turn of a whole key is undone."""
    model = built(case)
    with pytest.raises(SparseAttentionError, match=reason):
        sa_hf.patch_model(model, pattern)
    assert not any("sparse" in name for name, _ in model.named_modules())


def compressed() -> Any:
    if not hasattr(tf, "DeepseekV4ForCausalLM"):
        pytest.skip(f"transformers {tf.__version__} has no DeepseekV4")
    fields = {"num_key_value_heads": 1, "head_dim": 16, "layer_types": ["heavily_compressed_attention"] * 2}
    return tf.DeepseekV4ForCausalLM(tf.DeepseekV4Config(**{**LATENT, **fields})).eval()


def test_layers_that_add_keys_of_their_own_are_refused() -> None:
    """Those that choose among the tokens' keys are in ``test_indexed.py``."""
    model = compressed()
    with pytest.raises(UnsupportedModelError, match="changing the mask that it is given"):
        sa_hf.patch_model(model, "sliding_window", window=9)
    assert not any("sparse" in name for name, _ in model.named_modules())


def test_keys_beyond_the_positions_are_no_keys_of_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compressed key for 128 tokens: the probe's input is too short to have any."""
    model = compressed()
    monkeypatch.setattr(probe, "changes_its_mask", lambda attention: False)
    sa_hf.patch_model(model, "sliding_window", window=9)
    with torch.no_grad():
        model(tokens(1, 120), use_cache=False)
        with pytest.raises(SparseAttentionError, match="131 keys for 130 positions"):
            model(tokens(1, 130), use_cache=False)


@pytest.mark.parametrize("family", ["Glm4MoeLite", "MiniCPM3", "Youtu", "Mistral4", "AXK1"])
def test_kin(family: str) -> None:
    if not hasattr(tf, f"{family}ForCausalLM"):
        pytest.skip(f"transformers {tf.__version__} has no {family}")
    kind = getattr(tf, f"{family}Config")
    fields = {**LATENT, "head_dim": 8, "num_local_experts": 4, "num_experts": 4, "dim_model_base": 32}
    known = {name: value for name, value in fields.items() if name in kind.__dataclass_fields__ or name in SIZES}
    torch.manual_seed(0)
    model = getattr(tf, f"{family}ForCausalLM")(kind(**known)).eval()
    scattered(sa_hf.patch_model(model, PATTERNS["window"]))
    for side in ("right", "left"):
        check_against_eager(model, *ragged(side), limit=1e-4)
    check(model, past_key_values=sa_hf.sparse_cache(model))
