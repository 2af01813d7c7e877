"""A ``torch.utils.checkpoint`` of the user's own around a patched model: its recomputation repeats its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_cases import tiny_model, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sa_hf
from sa_hf import SparseAttentionError

EXPIRING = sa_hf.ExpireSpanAttentionConfig(
    max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1, random_shortening=True
)
MASKS = sa_hf.SparseBertAttentionConfig(mask_length=32, density_coef=2.0)
ROUTING = sa_hf.RoutingAttentionConfig(num_clusters=2, window=4, commitment_coef=0.1)
PATTERNS = [MASKS, EXPIRING, ROUTING, {"0": {"heads": {"0-1": MASKS, "2-": EXPIRING}}}]
NAMES = ["masks", "spans", "routing", "mixture"]

pytestmark = pytest.mark.filterwarnings("ignore:the auxiliary losses", "ignore:.*None of the inputs have requires_grad")


def losses_of(model: Any, run: Callable[..., Any]) -> list[Tensor]:
    """The losses of three batches, before any backward."""

    def loss(ids: Tensor, _: Tensor) -> Tensor:
        return model(ids, labels=ids, use_cache=False).loss

    anchor = torch.zeros(1, requires_grad=True)  # the reentrant kind trains nothing where no input has a gradient
    return [run(loss, tokens(2, 20, seed=seed), anchor) for seed in (1, 2, 3)]


def found(model: Any, total: Callable[[Any], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.train()
    value = total(model)
    value.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


def check_equal(plain: Any, other: Any) -> None:
    assert plain[0].keys() == other[0].keys()
    for name, gradient in plain[0].items():
        assert torch.allclose(gradient, other[0][name], rtol=1e-4, atol=1e-5), name
    for name, buffer in plain[1].items():
        assert torch.equal(buffer, other[1][name]), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layers", [False, True], ids=["", "layers-too"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=NAMES)
def test_accumulated_losses_are_recomputed_as_they_were(pattern: Any, layers: bool, reentrant: bool) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), pattern)
    twin = copy.deepcopy(model)
    if layers:
        twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def checkpointed(loss: Any, *args: Any) -> Any:
        return checkpoint(loss, *args, use_reentrant=reentrant)

    plain = found(model, lambda m: torch.stack(losses_of(m, lambda f, *args: f(*args))).sum())
    check_equal(plain, found(twin, lambda m: torch.stack(losses_of(m, checkpointed)).sum()))


@pytest.mark.parametrize("pattern", PATTERNS, ids=NAMES)
def test_the_body_alone_may_be_checkpointed(pattern: Any) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), pattern)
    twin = copy.deepcopy(model)

    def total(m: Any, run: Callable[..., Any]) -> Tensor:
        return sum(run(lambda x: m.model(x).last_hidden_state, tokens(2, 20, seed=s)).square().mean() for s in (1, 2))

    plain = found(model, lambda m: total(m, lambda f, x: f(x)))
    check_equal(plain, found(twin, lambda m: total(m, lambda f, x: checkpoint(f, x, use_reentrant=False))))


def test_inputs_made_inside_serve_where_one_forward_waits() -> None:
    def total(m: Any, run: Callable[..., Any]) -> Tensor:
        return run(lambda x: m(x.clone(), labels=x.clone()).loss, tokens(2, 20))

    model = sa_hf.patch_model(tiny_model("llama"), MASKS)
    twin = copy.deepcopy(model)
    plain = found(model, lambda m: total(m, lambda f, x: f(x)))
    check_equal(plain, found(twin, lambda m: total(m, lambda f, x: checkpoint(f, x, use_reentrant=False))))


def test_a_recomputation_that_cannot_be_told_raises() -> None:
    ids = tokens(2, 20)
    for made in (lambda x: x, lambda x: x.clone()):
        for pattern in (MASKS, EXPIRING, ROUTING):
            model = sa_hf.patch_model(tiny_model("llama"), pattern).train()

            def loss(x: Tensor, made: Any = made, model: Any = model) -> Tensor:
                return model(made(x), labels=x).loss

            both = sum(checkpoint(loss, ids, use_reentrant=False) for _ in range(2))
            with pytest.raises(SparseAttentionError, match=r"2 forwards.*\.clone\(\).*gradient_checkpointing_enable"):
                both.backward()
    # Nothing is drawn: any of them will do.
    model = sa_hf.patch_model(tiny_model("llama"), replace(EXPIRING, random_shortening=False)).train()
    sum(checkpoint(lambda x: model(x, labels=x).loss, ids, use_reentrant=False) for _ in range(2)).backward()


def test_the_same_batch_serves_again_after_a_step() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), MASKS).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = tokens(2, 20)
    for epoch in range(3):
        model(ids, labels=ids)  # a forward that is never recomputed
        optimizer.step()
        checkpoint(lambda x: model(x, labels=x).loss, ids, use_reentrant=False).backward()
        optimizer.step()
        assert int(model.model.layers[0].self_attn.sparse.step) == 2 * (epoch + 1)
    assert not model.sa_hf_patch.activity.forwards.started


def test_layers_checkpointed_by_hand_raise_where_their_forward_is_unknown() -> None:
    """A model that builds no mask: nothing reaches its layers that would say which forward they repeat."""
    import transformers as tf

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.CLIPVisionModel(tf.CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    sa_hf.patch_model(model, MASKS).train()
    layers = [module for name, module in model.named_modules() if name.endswith(("layers.0", "layers.1"))]
    assert len(layers) == 2
    for layer in layers:
        run = layer.forward
        layer.forward = lambda *a, run=run, **k: checkpoint(run, *a, use_reentrant=False, **k)
    out = model(torch.randn(2, 3, 32, 32))[0].square().mean()
    with pytest.raises(SparseAttentionError, match="does not say of which"):
        out.backward()
