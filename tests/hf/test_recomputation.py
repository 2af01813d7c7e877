"""Recomputation under gradient checkpointing: the same gradients, noise and steps, and of dense forwards dense ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import EXPIRING, MASKS, case, gradients, tiny_model, tokens

import sa_hf
from sa_hf import SparseAttentionError

NAMES = {
    "llama": "attention_dropout", "gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob", "t5": "dropout_rate",
    "modernbert": "attention_dropout",
}  # fmt: skip

CHECKPOINTED: list[tuple[str, Any]] = [
    ("llama", sa_hf.BigBirdAttentionConfig(block_size=16, num_random_blocks=1)),
    ("llama", EXPIRING),
    ("llama", sa_hf.ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6, random_shortening=True)),
    ("llama", sa_hf.RoutingAttentionConfig(num_clusters=2, window=4, commitment_coef=0.1)),
    ("llama", sa_hf.LogSparseAttentionConfig(conv_kernel_size=3)),
    ("gpt2", {"0": {"heads": {"0-1": "star", "2-": MASKS}}, "1": "dense"}),
    ("bert", MASKS),
    ("bert", sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=2)),
    ("bert", sa_hf.StarAttentionConfig(relay="virtual")),
    ("modernbert", sa_hf.StarAttentionConfig(relay="virtual")),
    ("t5", {"encoder": "longnet", "decoder": {"0": "sliding_window"}}),
    ("t5", {"encoder": sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=2)}),
]


@pytest.mark.parametrize(("family", "pattern"), CHECKPOINTED, ids=[str(i) for i in range(len(CHECKPOINTED))])
def test_gradient_checkpointing_changes_nothing(family: str, pattern: Any) -> None:
    """Dropout is on: the recomputation must draw the same masks, the same noise, and count no step."""
    c = case(family, **{NAMES[family]: 0.2})
    sa_hf.patch_model(c.model, pattern)
    c.model.train()
    inputs = dict(c.inputs)
    if family in ("llama", "gpt2", "t5"):
        inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    twin = copy.deepcopy(c.model)
    plain = gradients(c.model, inputs)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients(twin, inputs)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-6), name
    buffers = dict(twin.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in c.model.named_buffers())


@pytest.mark.parametrize("pattern", [MASKS, replace(EXPIRING, random_shortening=True)], ids=["masks", "spans"])
def test_recomputation_draws_the_noise_of_its_own_forward(pattern: Any) -> None:
    """Two forwards before one backward, as contrastive losses have it."""
    found = []
    for checkpointed in (False, True):
        model = sa_hf.patch_model(tiny_model("llama"), pattern).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = [model(tokens(2, 20, seed=seed), use_cache=False).logits for seed in (1, 2)]
        (outputs[0] * outputs[1].detach() + outputs[1].tanh()).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_knows_its_forward_where_the_model_builds_no_mask(reentrant: bool) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    images = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = tf.CLIPVisionModel(tf.CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
        sa_hf.patch_model(model, replace(MASKS, density_coef=0.0)).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        outputs = [model(image)[0] for image in images]
        (outputs[0] * outputs[1].detach() + outputs[1].tanh()).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-5), name
    sa_hf.unpatch_model(model)
    assert not any("Carrying" in repr(vars(module)) for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_dense_forward_is_not_recomputed_sparse(family: str, reentrant: bool) -> None:
    model = sa_hf.patch_model(tiny_model(family), "sliding_window", window=1).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = {"input_ids": tokens(2, 20)}
    with sa_hf.dense(model):
        model(**inputs)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with sa_hf.dense(model):
        outside, inside = (model(**inputs)[0].square().sum() for _ in range(2))
        inside.backward()
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-4), name
    with pytest.raises(SparseAttentionError, match="inside the block"):
        outside.backward()
