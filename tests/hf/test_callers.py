"""Whoever calls: ``model(...)``, ``model.forward(...)`` and the model inside it give the same; layers alone raise."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import case, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError

EXPIRING = sa_hf.ExpireSpanAttentionConfig(
    max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1, random_shortening=True
)
MASKS = sa_hf.SparseBertAttentionConfig(mask_length=32, density_coef=2.0)
ROUTING = sa_hf.RoutingAttentionConfig(num_clusters=2, window=4, commitment_coef=0.1)


def by_call(model: Any, **inputs: Any) -> Any:
    return model(**inputs)


def by_forward(model: Any, **inputs: Any) -> Any:
    return model.forward(**inputs)


def by_class(model: Any, **inputs: Any) -> Any:
    return type(model).forward(model, **inputs)


def trained(model: Any, call: Any, inputs: dict[str, Any], steps: int = 2) -> tuple[Any, list[Tensor]]:
    """A model after steps of training, and the losses and outputs on the way."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen = []
    for _ in range(steps):
        torch.manual_seed(3)
        out = call(model, **inputs)
        loss = out.loss if getattr(out, "loss", None) is not None else out[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    return model, seen


@pytest.mark.parametrize("call", [by_forward, by_class])
@pytest.mark.parametrize(
    ("family", "pattern", "labelled"),
    [
        ("llama", MASKS, True),
        ("llama", EXPIRING, True),
        ("llama", ROUTING, True),
        ("llama", ROUTING, False),
        ("gpt2", {"0": {"heads": {"0-1": "star", "2-": MASKS}}}, True),
        ("bert", MASKS, False),
        ("bert", ROUTING, False),
        ("modernbert", MASKS, False),
        ("bart", {"encoder": MASKS, "decoder": EXPIRING}, True),
        ("t5", {"encoder": MASKS, "decoder": replace(MASKS, seed=3)}, True),
    ],
    ids=lambda x: getattr(x, "name", x if isinstance(x, str) else None),
)
@pytest.mark.filterwarnings("ignore:the auxiliary losses")
def test_training_is_the_same_whoever_calls(family: str, pattern: Any, labelled: bool, call: Any) -> None:
    c = case(family)
    inputs: dict[str, Any] = dict(c.inputs)
    if labelled:
        inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    sa_hf.patch_model(c.model, pattern)
    twin = copy.deepcopy(c.model)
    expected, losses = trained(c.model, by_call, inputs)
    got, others = trained(twin, call, inputs)
    assert losses[0] != losses[1]  # noise, centroids and weights have moved
    assert torch.allclose(torch.stack(losses), torch.stack(others), atol=1e-6)
    state, other = expected.state_dict(), got.state_dict()
    for name, value in state.items():
        assert torch.allclose(value.float(), other[name].float(), atol=1e-6), name
    if pattern is ROUTING:
        assert all(bool(value) for name, value in other.items() if name.endswith("initialized"))


@pytest.mark.filterwarnings("ignore:the auxiliary losses")
def test_loops_that_call_the_model_inside_train_the_same() -> None:
    """The body, then a loss of the caller's own on what it returns."""

    def inner(model: Any, **inputs: Any) -> Any:
        return model.model(**inputs)

    def whole(model: Any, **inputs: Any) -> Any:
        return (model(**inputs, output_hidden_states=True).hidden_states[-1],)

    for pattern in (MASKS, EXPIRING, ROUTING):
        model = sa_hf.patch_model(tiny_model("llama"), pattern)
        twin = copy.deepcopy(model)
        expected, losses = trained(model, whole, {"input_ids": tokens(2, 20)})
        got, others = trained(twin, inner, {"input_ids": tokens(2, 20)})
        assert torch.allclose(torch.stack(losses), torch.stack(others))
        for name, value in expected.state_dict().items():
            assert torch.allclose(value.float(), got.state_dict()[name].float(), atol=1e-6), name
        assert int(next(b for n, b in got.named_buffers() if n.endswith("step"))) == 2


@pytest.mark.parametrize("call", [by_forward, by_class])
@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "t5", "vit"])
@pytest.mark.parametrize(
    "config",
    [sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=3), sa_hf.StarAttentionConfig(relay="virtual")],
    ids=["etc", "relay"],
)
def test_extra_tokens_stay_inside(family: str, config: Any, call: Any) -> None:
    c = case(family)
    sa_hf.patch_model(c.model, {"encoder": config})
    with torch.no_grad():
        c.model(**c.inputs, output_hidden_states=True)  # the recording hooks are installed by the first call that asks
        expected = c.model(**c.inputs, output_hidden_states=True)
        got = call(c.model, **c.inputs, output_hidden_states=True)
    key = "encoder_hidden_states" if family == "t5" else "hidden_states"
    for ours, theirs in zip(got[key], expected[key], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(got[0], expected[0])


def test_packed_positions_reach_a_forward_without_hooks() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), "sliding_window", window=1000)
    ids = tokens(1, 14)
    positions = torch.tensor([[*range(6), *range(8)]])
    with torch.no_grad():
        packed = model.forward(ids, position_ids=positions).logits
        alone = [model(part).logits for part in (ids[:, :6], ids[:, 6:])]
        named = model.model.forward(ids, sequence_ids=positions.eq(0).cumsum(-1))[0]
        assert torch.allclose(named, model.model(ids, position_ids=positions)[0], atol=1e-5)  # RoPE is relative
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-5)


@pytest.mark.parametrize("config", [MASKS, EXPIRING, ROUTING], ids=lambda c: c.name)
def test_layers_called_alone_raise_in_training(config: Any) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), config)
    hidden = torch.randn(1, 9, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(9)[None])
    model.model.layers[0](hidden, position_embeddings=rotary)
    model.train()
    with pytest.raises(SparseAttentionError, match=r"outside of any forward.*Call the model"):
        model.model.layers[0](hidden, position_embeddings=rotary)


def test_an_interrupted_forward_is_over() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), MASKS).train()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1, 6))
    handle.remove()
    assert model.sa_hf_patch.activity.within.get() is None
    before = int(model.model.layers[0].self_attn.sparse.step)
    model(tokens(1, 6), labels=tokens(1, 6)).loss.backward()
    assert int(model.model.layers[0].self_attn.sparse.step) == before + 1


def test_the_forward_keeps_its_signature_and_goes_with_the_patch() -> None:
    model = tiny_model("llama")
    original = type(model).forward
    sa_hf.patch_model(model, "sliding_window")
    assert "labels" in tf.utils.generic.inspect.signature(model.forward).parameters
    sa_hf.unpatch_model(model)
    assert type(model).forward is original
    assert not any("sa_hf_forward" in vars(module) for module in model.modules())


def test_centroids_move_under_prompt_tuning() -> None:
    """The optimizer trains what stands in front of a frozen model: its centroids start and move all the same."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = sa_hf.patch_model(tiny_model("llama"), ROUTING)
    twin, tuned = copy.deepcopy(model).train(), peft.get_peft_model(model, config).train()
    prompt = tuned.prompt_encoder["default"].embedding.weight
    optimizers = torch.optim.SGD([prompt], lr=0.5), torch.optim.SGD(twin.parameters(), lr=0.0)
    ids = tokens(2, 16)
    before = [layer.self_attn.sparse.centroids.clone() for layer in model.model.layers]
    for _ in range(2):
        embedded = torch.cat([prompt.detach().expand(2, -1, -1), twin.get_input_embeddings()(ids)], dim=1)
        twin(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
        tuned(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for layer, other, start in zip(model.model.layers, twin.model.layers, before, strict=True):
        sparse = layer.self_attn.sparse
        assert bool(sparse.initialized)
        assert not torch.allclose(sparse.centroids, start)
        assert torch.allclose(sparse.centroids, other.self_attn.sparse.centroids, atol=1e-5)
