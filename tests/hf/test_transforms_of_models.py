"""torch.func over patched models: gradients of reverse mode, those of each sample, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_cases import tiny_model, tokens
from torch import Tensor, func

import sa_hf
from sa_hf import SparseAttentionError

# (family, pattern, options)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "sliding_window", {"window": 5}),
    ("llama", "longnet", {"segment_length": (8, 16), "dilated_ratio": (1, 2)}),
    ("llama", "logsparse", {}),
    ("llama", "sparse_transformer", {"stride": 5, "summary": 1}),
    ("llama", "expire_span", {"max_span": 128, "ramp": 8, "initial_span": 10.0}),
    ("llama", "sparsebert", {"mask_length": 64}),
    ("llama", "routing", {"num_clusters": 2, "window": 6}),
    ("llama", "block_topk", {"block_size": 4, "top_k": 2}),
    ("bert", "bigbird", {"block_size": 4, "num_extra_tokens": 2}),
    ("bert", "star", {"relay": "virtual"}),
    ("bert", "routing", {"num_clusters": 4, "window": 6, "local_window": 4}),
    ("t5", "sliding_window", {"window": 4}),
]
IDS = [f"{family}-{name}" for family, name, _ in CASES]
LEARNED = ("expire_span", "sparsebert", "routing")
GATED = "sparsebert"  # until it is frozen it runs by torch's operators, which have every derivative


def patched(family: str, name: str, options: dict[str, Any]) -> Any:
    model = tiny_model(family).double()
    model.set_attn_implementation("eager")  # torch's fused attention has no forward mode either
    return sa_hf.patch_model(model, name, **options)


def call(model: Any, ids: Tensor) -> dict[str, Tensor]:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return (
        {"input_ids": ids, **more}
        if model.config.model_type == "bert"
        else {"input_ids": ids, "use_cache": False, **more}
    )


def functional(model: Any) -> Any:
    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        return func.functional_call(model, parameters, (), call(model, ids))[0].square().mean()

    return loss


def expected(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(**call(model, ids))[0].square().mean().backward()
    return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}


def parameters(model: Any) -> dict[str, Tensor]:
    return {k: p.detach() for k, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "name", "options"), CASES, ids=IDS)
def test_gradients_and_those_of_each_sample(family: str, name: str, options: dict[str, Any]) -> None:
    model, ids = patched(family, name, options), tokens(3, 20)
    loss = functional(model)
    torch.testing.assert_close(func.grad(loss)(parameters(model), ids), expected(model, ids))
    each = func.vmap(func.grad(lambda p, row: loss(p, row[None])), in_dims=(None, 0))(parameters(model), ids)
    for row in range(3):
        one = {k: x[row] for k, x in each.items()}
        torch.testing.assert_close(one, expected(model, ids[row : row + 1]))


@pytest.mark.parametrize(("family", "name", "options"), CASES, ids=IDS)
def test_forward_mode_is_right_or_refused(family: str, name: str, options: dict[str, Any]) -> None:
    model, ids = patched(family, name, options), tokens(1, 20)
    loss, point = functional(model), parameters(model)
    tangent = {k: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) for k, p in point.items()}

    def along(p: dict[str, Tensor]) -> Tensor:
        return func.jvp(lambda p: loss(p, ids), (p,), (tangent,))[1]

    if name != GATED:
        with pytest.raises(SparseAttentionError, match="forward-mode"):
            along(point)
        with sa_hf.dense(model):
            assert along(point).isfinite()
        return
    gradient = expected(model, ids)
    expected_slope = torch.stack([torch.sum(gradient[k] * tangent[k]) for k in point]).sum()
    torch.testing.assert_close(along(point), expected_slope, rtol=1e-5, atol=0)  # its gate is fp32


@pytest.mark.parametrize(("family", "name", "options"), CASES, ids=IDS)
def test_a_gradient_penalty_is_right_or_refused(family: str, name: str, options: dict[str, Any]) -> None:
    model, ids = patched(family, name, options), tokens(1, 20)
    weights = [p for p in model.parameters() if p.requires_grad]

    def first() -> tuple[Tensor, ...]:
        loss = functional(model)(dict(model.named_parameters()), ids)
        return torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)

    def penalty() -> Tensor:
        return torch.stack([g.square().sum() for g in first() if g is not None]).sum()

    if name != GATED:
        with pytest.raises(SparseAttentionError, match="twice"):
            torch.autograd.grad(penalty(), weights, allow_unused=True)
        return
    found = torch.autograd.grad(penalty(), weights, allow_unused=True)
    at, step = next(i for i, g in enumerate(found) if g is not None and g.dim() == 2), 1e-6
    slope = found[at].flatten()[7].item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weights[at].view(-1)[7] += sign * step
        values.append(penalty().item())
        with torch.no_grad():
            weights[at].view(-1)[7] -= sign * step
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("family", "name", "options"), [case for case in CASES if case[1] != "sliding_window"])
def test_nothing_of_a_transform_stays(family: str, name: str, options: dict[str, Any]) -> None:
    """Its tensors are none outside of it: one that is kept breaks a copy and the figures."""
    model, ids = patched(family, name, options), tokens(3, 20)
    model(**call(model, ids))
    before = sa_hf.figures(model), sa_hf.auxiliary_losses(model)
    func.vmap(func.grad(lambda p, row: functional(model)(p, row[None])), in_dims=(None, 0))(parameters(model), ids)
    assert (sa_hf.figures(model), sa_hf.auxiliary_losses(model)) == before
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**call(model, ids))[0], model(**call(model, ids))[0])


@pytest.mark.parametrize(("family", "name", "options"), [case for case in CASES if case[1] in LEARNED])
def test_learned_patterns_in_training_name_eval(family: str, name: str, options: dict[str, Any]) -> None:
    model, ids = patched(family, name, options).train(), tokens(1, 20)
    state = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(SparseAttentionError, match=rf"'{name}' in training.*torch\.func.*model\.eval\(\)"):
        func.grad(functional(model))(parameters(model), ids)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
    functional(model.eval())(parameters(model), ids)


@pytest.mark.parametrize("name", ["attention_mask", "sequence_ids"])
def test_a_mask_for_each_sample_names_the_reason(name: str) -> None:
    model, ids = patched("llama", "sliding_window", {"window": 5}), tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def loss(p: dict[str, Tensor], row: Tensor, one: Tensor) -> Tensor:
        given = {"input_ids": row[None], name: one[None], "use_cache": False}
        return func.functional_call(model, p, (), given)[0].square().mean()

    with pytest.raises(SparseAttentionError, match=rf"{name} is mapped by torch\.func\.vmap.*in_dims None"):
        func.vmap(func.grad(loss), in_dims=(None, 0, 0))(parameters(model), ids, mask)
    shared = func.vmap(func.grad(loss), in_dims=(None, 0, None))(parameters(model), ids, mask[0])
    alone = func.grad(loss)(parameters(model), ids[1], mask[0])
    torch.testing.assert_close({key: x[1] for key, x in shared.items()}, alone)
