"""What the probe proves of a layer's inside: where a convolution's taps arrive, and what comes before the rotation."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import SIZES, TOKENS, scattered
from generation_cases import check
from hf_cases import error, tiny_model, tokens
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import sa_hf
from sa_hf import SparseAttentionError, UnsupportedModelError

ROUTING = sa_hf.RoutingAttentionConfig(num_clusters=3, window=6)
CONVOLVED = sa_hf.LogSparseAttentionConfig(local_window=1000, conv_kernel_size=3)
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=5)


def built(family: str, head: str = "ForCausalLM", **fields: Any) -> Any:
    if not hasattr(tf, f"{family}Config"):
        pytest.skip(f"transformers {tf.__version__} has no {family}")
    torch.manual_seed(0)
    return getattr(tf, family + head)(getattr(tf, f"{family}Config")(**SIZES, **TOKENS, **fields)).eval()


def test_a_norm_after_the_rotary_embedding_is_nothing_that_routing_can_undo() -> None:
    model = built("HunYuanDenseV1", num_key_value_heads=2, head_dim=8)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 \(model\.layers\.0\.self_attn\) does more to its queries"
    ):
        sa_hf.patch_model(model, ROUTING)
    assert not any("sparse" in name for name, _ in model.named_modules())
    sa_hf.patch_model(model, WINDOW)
    check(scattered(model))


def llama_with(monkeypatch: pytest.MonkeyPatch, change: Any) -> Any:
    """Llama whose attention does something of its own to (queries, keys, values, input) before they are used."""

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None,
        cache: Any = None, past_key_values: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        query, key, value = change(query, key, value)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    return tiny_model("llama")


FADING = torch.linspace(1, 2, 8)


@pytest.mark.parametrize(
    ("pattern", "change", "reason"),
    [
        (ROUTING, lambda q, k, v: (q * FADING, k, v), "does more to its queries than turn them"),
        (ROUTING, lambda q, k, v: (q, k * FADING, v), "does more to its keys than turn them"),
        (ROUTING, lambda q, k, v: (q, k, v), None),
        (ROUTING, lambda q, k, v: (2 * q, k, v), None),
        (CONVOLVED, lambda q, k, v: (q, k, v + q[:, :2]), "makes more than its query of the channels"),
        (CONVOLVED, lambda q, k, v: (q, k, v + k), "makes more than its key of the channels"),
        (CONVOLVED, lambda q, k, v: (q.new_ones(q.shape), k, v), "does not make its query of the projection"),
        (CONVOLVED, lambda q, k, v: (q, k, v), None),
    ],
    ids=[
        "turned queries", "turned keys", "turned as it is", "turned and scaled", "values of queries", "values of keys",
        "other queries", "taps as it is",
    ],
)  # fmt: skip
def test_what_is_turned_back_must_be_what_went_in_and_taps_must_reach_queries_and_keys_alone(
    monkeypatch: pytest.MonkeyPatch, pattern: Any, change: Any, reason: Any
) -> None:
    model = llama_with(monkeypatch, change)
    if reason is None:
        sa_hf.patch_model(model, pattern)
        return
    with pytest.raises(UnsupportedModelError, match=reason):
        sa_hf.patch_model(model, pattern)
    sa_hf.patch_model(model, WINDOW)


def test_a_projection_that_makes_gates_along_is_refused() -> None:
    model = built(
        "Qwen3_5Text" if not hasattr(tf, "Qwen3NextConfig") else "Qwen3Next", num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(SparseAttentionError, match="projections that are not of its queries and keys alone"):
        sa_hf.patch_model(model, CONVOLVED)


def with_taps(stack: ExitStack, model: Any, mask: Tensor) -> None:
    """The convolution, written with shifts of the real inputs, on a model's own dense attention."""
    stack.enter_context(sa_hf.dense(model))
    for module in model.modules():
        conv = getattr(getattr(module, "sparse", None), "conv", None)
        for name, weight in () if conv is None else (("q_proj", conv.query), ("k_proj", conv.key)):

            def joined(_: nn.Module, args: Any, out: Tensor, weight: Tensor = weight) -> Tensor:
                x = args[0] * mask[..., None]
                earlier = (nn.functional.pad(x, (0, 0, t, 0))[:, : x.shape[1]] for t in (1, 2))
                return out + sum(e @ w.T for e, w in zip(earlier, weight, strict=True))

            stack.callback(getattr(module, name).register_forward_hook(joined).remove)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["FlexOlmo", "Olmo2", "Esmc"])
def test_convolved_queries_below_a_norm_of_all_heads(family: str, side: str) -> None:
    """Models that normalise queries and keys over all heads at once, after the projection that the taps join."""
    encoder = family == "Esmc"
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if family == "FlexOlmo" else {}
    model = built(family, "Model" if encoder else "ForCausalLM", num_key_value_heads=4 if encoder else 2, **experts)
    scattered(sa_hf.patch_model(model, CONVOLVED))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, slice(13, None) if side == "right" else slice(11)] = 0
    ids = tokens(2, 24)
    with torch.no_grad(), ExitStack() as stack:
        ours = model(ids, attention_mask=mask)[0][mask.bool()]
        with_taps(stack, model, mask)
        assert error(ours, model(ids, attention_mask=mask)[0][mask.bool()]) < 1e-4
    if not encoder:
        check(model)


def test_extra_tokens_meet_what_layers_take_for_each_token() -> None:
    """EmbeddingGemma 2 adds an input of its own for each token in every layer."""
    model = built("EmbeddingGemma2Text", "Model", num_key_value_heads=2, head_dim=8)
    modules = [name for name, _ in model.named_modules()]
    for pattern in (
        sa_hf.StarAttentionConfig(relay="virtual"),
        sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=2),
    ):
        with pytest.raises(UnsupportedModelError, match=r"1 extra token|2 extra tokens"):
            sa_hf.patch_model(model, pattern)
    assert [name for name, _ in model.named_modules()] == modules
    sa_hf.patch_model(model, sa_hf.StarAttentionConfig())
