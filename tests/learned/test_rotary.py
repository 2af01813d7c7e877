"""Routing looks at queries and keys from before the rotary embedding, in every convention that models turn them by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sa_hf
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.forward.rotary import before_rotary
from sa_hf.hf.state.patch import patch_of
from sa_hf.layer import AttentionInputs
from sa_hf.patterns.routing import RoutingAttention

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# Halves; halves of a part; neighbours; neighbours of a part; scaled; by an angle of two dimensions; scaled halves of
# a part.
TURNED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "gpt_neox": ("GPTNeoX", {"rope_parameters": HALF}),
    "phi": ("Phi", {**GROUPED, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLm", {**GROUPED, "partial_rotary_factor": 0.25}),
    "cohere": ("Cohere", GROUPED),
    "glm": ("Glm", {**GROUPED, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "yarn": ("Llama", {**GROUPED, "rope_parameters": YARN}),
    "gpt_oss": ("GptOss", {**GROUPED, **EXPERTS, "head_dim": 8, "rope_parameters": YARN}),
    "phi_yarn": ("Phi", {**GROUPED, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
}  # fmt: skip


def tiny(family: str, fields: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **fields})
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def routed(model: nn.Module) -> list[RoutingAttention]:
    return [module for module in model.modules() if isinstance(module, RoutingAttention)]


def spy(layer: RoutingAttention, found: list[tuple[Tensor, Tensor]]) -> None:
    """Note what the layer compares with its centroids."""
    vectors_of = layer._vectors

    def vectors(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        query, key = vectors_of(inputs)
        found.append((normalised(query), normalised(key)))
        return query, key

    layer._vectors = vectors  # type: ignore[method-assign]


def seen_vectors(model: nn.Module, shift: int) -> list[tuple[Tensor, Tensor]]:
    """What the first layer compares with its centroids, at positions that begin at ``shift``."""
    found: list[tuple[Tensor, Tensor]] = []
    spy(routed(model)[0], found)
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids, position_ids=torch.arange(20)[None] + shift, use_cache=False)
    return found


def normalised(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize("name", TURNED)
def test_vectors_are_those_of_the_projections(name: str) -> None:
    family, fields = TURNED[name]
    model = sa_hf.patch_model(tiny(family, fields), "routing", num_clusters=4, window=4)
    attention = next(m for m in model.modules() if getattr(m, "sparse", None) is routed(model)[0])
    made: dict[str, Tensor] = {}
    for child_name, child in attention.named_children():
        if isinstance(child, nn.Linear):
            child.register_forward_hook(lambda _, args, out, n=child_name: made.__setitem__(n, out))
    (query, key), (shifted_query, shifted_key) = (seen_vectors(model, shift)[0] for shift in (0, 40))
    if "query_key_value" in made:
        q, k, _ = made["query_key_value"].view(2, 20, 4, 3 * 8).transpose(1, 2).chunk(3, dim=-1)
    else:
        q, k = (made[n].view(2, 20, -1, 8).transpose(1, 2) for n in ("q_proj", "k_proj"))
    for got, shifted, wanted in ((query, shifted_query, q), (key, shifted_key, k)):
        torch.testing.assert_close(got, normalised(wanted), rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(shifted, got, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", TURNED)
def test_a_step_finds_the_clusters_of_the_whole_forward(name: str) -> None:
    """Where halves are turned, by angles alone; in other conventions by the layer's own function."""
    family, fields = TURNED[name]
    model = sa_hf.patch_model(tiny(family, fields), "routing", num_clusters=4, window=4)
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    layer, asked = routed(model)[0], list[tuple[Tensor, Tensor]]()
    with torch.no_grad():
        model(ids, use_cache=False)
        whole = layer._seen
        cache = model(ids[:, :15], use_cache=True).past_key_values
        spy(layer, asked)
        for at in range(15, 20):
            model(ids[:, at : at + 1], past_key_values=cache)
    assert whole is not None
    assert layer._seen is not None
    assert torch.equal(layer._seen[0], whole[0])
    halves = family in ("Llama", "GPTNeoX", "Phi", "StableLm")
    assert len(asked) == (0 if halves else 5)


def test_an_encoder_with_and_one_without_rotary_embedding() -> None:
    torch.manual_seed(0)
    fields = {**TINY, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    modern = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**fields)).eval()
    sa_hf.patch_model(modern, "routing", num_clusters=4)
    (query, key), (shifted_query, shifted_key) = (seen_vectors_of_encoder(modern, shift) for shift in (0, 40))
    torch.testing.assert_close(query, shifted_query, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(key, shifted_key, rtol=1e-4, atol=2e-4)

    bert = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    attention = bert.encoder.layer[0].attention.self
    x = torch.randn(1, 4, 5, 8)
    assert before_rotary(attention, None, x, x)[0] is x


def seen_vectors_of_encoder(model: nn.Module, shift: int) -> tuple[Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    spy(routed(model)[0], found)
    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids, position_ids=torch.arange(20)[None] + shift)
    return found[0]


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        # Some layers of these turn nothing, though all are given the angles.
        ("SmolLM3", GROUPED, "in some layers or cases alone"),
        ("Cohere2", GROUPED, "in some layers or cases alone"),
    ],
)
def test_what_cannot_be_undone_is_refused(family: str, fields: dict[str, Any], reason: str) -> None:
    model = tiny(family, fields)
    for pattern in ("routing", {"heads": {"0-1": "routing", "2-": "dense"}}):
        with pytest.raises(SparseAttentionError, match=reason):
            sa_hf.patch_model(model, pattern)
    assert patch_of(model) is None
    sa_hf.patch_model(model, "sliding_window")
