"""torch's function transforms over the bare operator: equal to the dense fp64 oracle's, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sa_hf import BigBirdAttentionConfig, SparseAttentionError, sparse_attention
from sa_hf.ops.choice import TRITON
from sa_hf.ops.cpp.kernels import SWITCH
from sa_hf.ops.decode import decode_attention
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.planned import planned_attention
from sa_hf.patterns.expire_span import EXPIRING

CONFIG = BigBirdAttentionConfig(block_size=4, num_random_blocks=1)
FORWARD, SECOND = "no forward-mode derivative.*sa_hf.dense", "cannot be differentiated twice.*sa_hf.dense"
Run = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(batch: int = 2, length: int = 24) -> tuple[Tensor, ...]:
    return tuple(draw(batch, heads, length, 8, seed=heads + at) for at, heads in enumerate((4, 2, 2)))


def ours(*tensors: Tensor, engine: str = "native", **call: Any) -> Tensor:
    return sparse_attention(*tensors, CONFIG, causal=True, engine=engine, **call)


def spanned(*tensors: Tensor) -> Tensor:
    """Data decides the plan here, by an operator of its own."""
    spans = torch.linspace(2, 20, 24, dtype=torch.float64).expand(len(tensors[0]), 1, -1)
    options = ScoreOptions(0.3, spans=spans, ramp=4.0)
    return planned_attention(*tensors, EXPIRING, options, "native", numbers=[23])


def oracle(*tensors: Tensor) -> Tensor:
    return ours(*tensors, engine="reference")


def loss(run: Run, *tensors: Tensor) -> Tensor:
    return (run(*tensors) * torch.linspace(-1, 1, 8, dtype=torch.float64)).square().sum()


@pytest.fixture(params=["kernels", "torch"])
def engine_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and by torch's operators."""
    if request.param == "torch":
        monkeypatch.setenv(SWITCH, "0")
    return str(request.param)


# -- reverse mode --------------------------------------------------------------------------------------------------


def of_one(run: Run, tensors: tuple[Tensor, ...]) -> Run:
    return lambda q: run(q, *tensors[1:])


REVERSE: dict[str, Callable[[Run, tuple[Tensor, ...]], Any]] = {
    "grad": lambda run, x: func.grad(partial(loss, run), argnums=(0, 1, 2))(*x),
    "vjp": lambda run, x: func.vjp(run, *x)[1](draw(2, 4, 24, 8, seed=9)),
    "vmap": lambda run, x: func.vmap(lambda *one: run(*(t[None] for t in one)))(*x),
    "vmap of queries": lambda run, x: func.vmap(of_one(run, x), in_dims=1)(torch.stack([x[0], 2 * x[0]], 1)),
    "per sample": lambda run, x: func.vmap(
        func.grad(lambda *one: loss(run, *(t[None] for t in one)), argnums=(0, 1, 2))
    )(*x),
    "per sample, values shared": lambda run, x: func.vmap(
        func.grad(lambda q, k, v: loss(run, q[None], k[None], v), argnums=(0, 1, 2)), in_dims=(0, 0, None)
    )(x[0], x[1], x[2][:1]),
    "jacrev": lambda run, x: func.jacrev(lambda q: run(q, *x[1:]).sum((0, 2)), chunk_size=5)(x[0]),
    "nested vmap": lambda run, x: func.vmap(func.vmap(lambda q: run(q[None], x[1][:1], x[2][:1])))(
        torch.stack([x[0], x[0] + 1])
    ),
}


@pytest.mark.parametrize("name", REVERSE)
def test_reverse_mode_and_vmap_equal_the_oracle(name: str, engine_of: str) -> None:
    expected = REVERSE[name](oracle, qkv())
    torch.testing.assert_close(REVERSE[name](ours, qkv()), expected)


@pytest.mark.parametrize("name", ["grad", "per sample", "jacrev"])
def test_plans_by_data_too(name: str) -> None:
    """Against themselves, sample by sample and number by number, in plain autograd."""
    tensors = qkv()
    leaves = [x.clone().requires_grad_() for x in tensors]
    found = REVERSE[name](spanned, tensors)
    if name == "jacrev":
        rows = spanned(*leaves).sum((0, 2)).flatten()
        expected: Any = torch.stack([torch.autograd.grad(x, leaves[0], retain_graph=True)[0] for x in rows])
        found = found.flatten(0, 1)
    else:
        expected = torch.autograd.grad(loss(spanned, *leaves), leaves)
        found = tuple(x.flatten(0, 1) if x.dim() == 5 else x for x in found)
    torch.testing.assert_close(found, expected)


def test_dropout_is_that_of_one_sample(engine_of: str) -> None:
    tensors = tuple(x[:1].expand(3, -1, -1, -1) for x in qkv())

    def one(*sample: Tensor) -> Tensor:
        return loss(partial(ours, dropout=0.4), *(x[None] for x in sample))

    torch.manual_seed(3)
    (expected,) = func.grad(one, argnums=(0,))(*(x[0] for x in tensors))
    torch.manual_seed(3)
    (same,) = func.vmap(func.grad(one, argnums=(0,)), randomness="same")(*tensors)
    torch.testing.assert_close(same, expected.expand_as(same))
    (different,) = func.vmap(func.grad(one, argnums=(0,)), randomness="different")(*tensors)
    assert not torch.allclose(different[0], different[1])


def test_padded_rows_are_mapped_with_a_mask_that_is_shared() -> None:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5], mask[1, 20:] = 0, 0
    stacked = tuple(torch.stack([x, x + 1]) for x in qkv())
    found = func.vmap(func.grad(partial(loss, partial(ours, attention_mask=mask))))(*stacked)
    for copy in range(2):
        one = tuple(x[copy] for x in stacked)
        expected = func.grad(partial(loss, partial(ours, attention_mask=mask, engine="reference")))(*one)
        torch.testing.assert_close(found[copy], expected)


# -- what is refused -----------------------------------------------------------------------------------------------


def by_dual_numbers(run: Run, x: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x[0], x[0]), *x[1:])).tangent


def with_graph(run: Run, x: tuple[Tensor, ...]) -> Tensor:
    """A gradient penalty: what is missing from its gradient would not be missed, since another way leads to it."""
    q = x[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(run, q, *x[1:]) + q.square().sum(), q, create_graph=True)
    return torch.autograd.grad(first.square().sum(), q)[0]


def dual_gradient(run: Run, x: tuple[Tensor, ...]) -> Tensor:
    q = x[0].clone().requires_grad_()
    out = run(q, *x[1:])
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(out, q, forward_ad.make_dual(out.detach(), out.detach()))
        return forward_ad.unpack_dual(found).tangent


REFUSED: dict[str, tuple[str, Callable[[Run, tuple[Tensor, ...]], Any]]] = {
    "jvp": (FORWARD, lambda run, x: func.jvp(of_one(run, x), (x[0],), (x[0],))),
    "forward_ad": (FORWARD, by_dual_numbers),
    "a gradient with a tangent": (FORWARD, dual_gradient),
    "jacfwd": (FORWARD, lambda run, x: func.jacfwd(of_one(run, x))(x[0])),
    "linearize": (FORWARD, lambda run, x: func.linearize(of_one(run, x), x[0])),
    "hessian": (FORWARD, lambda run, x: func.hessian(lambda q: loss(run, q, *x[1:]))(x[0])),
    "jvp of grad": (FORWARD, lambda run, x: func.jvp(func.grad(lambda q: loss(run, q, *x[1:])), (x[0],), (x[0],))),
    "grad of grad": (SECOND, lambda run, x: func.grad(lambda q: REVERSE["grad"](run, (q, *x[1:]))[0].sum())(x[0])),
    "create_graph": (SECOND, with_graph),
    "the double-backward trick": (
        SECOND, lambda run, x: torch.autograd.functional.jvp(of_one(run, x), (x[0],), (x[0],))
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["plain", "a mode that sees operators"])
@pytest.mark.parametrize("run", [ours, spanned], ids=["static", "by data"])
@pytest.mark.parametrize("name", REFUSED)
def test_forward_mode_and_second_derivatives_are_refused(name: str, run: Run, mode: str, engine_of: str) -> None:
    reason, derivative = REFUSED[name]
    seen = nullcontext() if mode == "plain" else FlopCounterMode(display=False)
    with seen, pytest.raises(SparseAttentionError, match=reason):
        derivative(run, qkv())


@pytest.mark.parametrize("name", ["jvp", "forward_ad", "hessian", "create_graph", "jacfwd", "grad of grad"])
def test_the_oracle_that_the_error_names_has_them(name: str) -> None:
    """Against a dense softmax in torch's own operators."""
    tensors = qkv(1, 12)
    kept = CONFIG.mask(12, 4, 0, True)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~kept, -torch.inf).softmax(-1) @ v

    found, expected = (REFUSED[name][1](run, tensors) for run in (oracle, dense))
    torch.testing.assert_close(found, expected)


def test_transforms_that_are_compiled_say_so() -> None:
    tensors = qkv()

    def compiled(function: Callable[..., Any]) -> Any:
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager", fullgraph=True)(tensors[0])

    for transform in (
        lambda q: func.jvp(of_one(ours, tensors), (q,), (q,))[1],
        lambda q: func.grad(lambda x: loss(ours, x, *tensors[1:]))(q),
    ):
        with pytest.raises(Exception, match="does not trace sparse attention under a function transform"):
            compiled(transform)
    torch._dynamo.reset()
    whole = torch.compile(lambda q: REVERSE["grad"](ours, (q, *tensors[1:])), backend="aot_eager")
    torch.testing.assert_close(whole(tensors[0]), REVERSE["grad"](oracle, tensors))
    with pytest.raises(SparseAttentionError, match=FORWARD):  # a graph break runs it as it stands
        torch.compile(lambda q: REFUSED["jvp"][1](ours, (q, *tensors[1:])), backend="aot_eager")(tensors[0])


def test_a_compiled_graph_refuses_a_second_derivative() -> None:
    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in qkv())
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"twice|double backward"):
        with_graph(run, (q, k, v))


def test_decoding_has_its_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few queries read lists of keys by torch's operators; the kernel, which has none, is not chosen."""
    query, key, value = draw(1, 2, 1, 16), draw(1, 2, 9, 16, seed=1), draw(1, 2, 9, 16, seed=2)
    index = torch.arange(0, 9, 2)[None, None, None]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k[:, :, ::2].transpose(-1, -2) / 4).softmax(-1) @ v[:, :, ::2]

    def listed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention(q, k, v, index, ScoreOptions(0.25))

    tensors, tangents = (query, key, value), tuple(x.cos() for x in (query, key, value))
    torch.testing.assert_close(func.jvp(listed, tensors, tangents), func.jvp(dense, tensors, tangents))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, query)
        reason = TRITON.cannot_decode(dual, key, value, ScoreOptions(0.25))
    assert reason is not None
    assert "forward-mode" in reason


@pytest.mark.parametrize("run", [ours, spanned], ids=["static", "by data"])
def test_a_trace_by_jit_is_refused(run: Run) -> None:
    with torch.no_grad(), pytest.raises(SparseAttentionError, match=r"torch\.jit\.trace.*sa_hf\.dense"):
        torch.jit.trace(run, qkv(), check_trace=False)
