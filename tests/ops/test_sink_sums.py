"""Sinks, and values of another width, through every way into an operator: against the fp64 oracle and plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_cases import rms_ratio
from torch import Tensor, func

from sa_hf import ExpireSpanAttentionConfig, RoutingAttentionConfig, SlidingWindowAttentionConfig, SparseAttentionError
from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.decode import decode_attention
from sa_hf.ops.parts import Band, ScoreOptions
from sa_hf.ops.planned import planned_attention
from sa_hf.ops.reference import dense_attention
from sa_hf.ops.sequences import Sequences
from sa_hf.ops.sinks import sinks_gradient, with_sinks
from sa_hf.patterns.base import dense_multiplicity, whole_geometry
from sa_hf.patterns.clusters import MEMBERS
from sa_hf.patterns.custom_op import layer_key, static_attention
from sa_hf.patterns.expire_span import EXPIRING

HEADS, KV_HEADS, N, D = 4, 2, 40, 16
CONFIG = SlidingWindowAttentionConfig(window=7, num_sink_tokens=2)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def inputs(width: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value, sinks."""
    shapes = (batch, HEADS, N, D), (batch, KV_HEADS, N, D), (batch, KV_HEADS, N, width), (HEADS,)
    return [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def by_loops(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, kept: Tensor) -> Tensor:
    """One sequence ``[H, n, D]`` in fp64: a softmax over the row's scores and the sink, whose share is dropped."""
    rows = []
    for h in range(HEADS):
        for i in range(q.shape[1]):
            keys = kept[h, i].nonzero().flatten()
            scores = k[h // 2, keys].double() @ q[h, i].double() * D**-0.5
            shares = torch.softmax(torch.cat([scores, sinks[h : h + 1].double()]), 0)[:-1]
            rows.append(shares @ v[h // 2, keys].double())
    return torch.stack(rows).view(HEADS, q.shape[1], v.shape[2])


def static(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, sequences: Sequences, engine: str) -> Tensor:
    layer = layer_key(CONFIG, tuple(range(HEADS)), HEADS, 0, True, Band(), engine)
    return static_attention(q, k, v, sequences, layer, ScoreOptions(D**-0.5, sinks=sinks))


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("width", [D, 8, 24])
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_pattern(padded: bool, width: int, engine: str) -> None:
    tensors = inputs(width)
    mask = torch.ones(2, N, dtype=torch.long)
    if padded:
        mask[0, :13], mask[1, 20:23] = 0, 0
    sequences = Sequences.from_mask(2, N, N, mask if padded else None, None)
    out = static(*tensors, sequences, engine)
    expected = torch.zeros(out.shape, dtype=torch.float64)
    for row in range(2):
        real = mask[row].nonzero().flatten()
        kept = CONFIG.mask(len(real), HEADS, causal=True)
        alone = by_loops(*(x[row][:, real] for x in tensors[:3]), tensors[3], kept)
        expected = expected.index_put((torch.tensor(row), torch.arange(HEADS)[:, None], real), alone)
    upstream = draw(*out.shape, seed=9).detach()
    grads = torch.autograd.grad(out, tensors, upstream)
    wanted = torch.autograd.grad(expected, tensors, upstream.double())
    assert not out[~mask.bool()[:, None].expand(-1, HEADS, -1)].any()
    for ours, oracle in zip((out, *grads), (expected, *wanted), strict=True):
        assert rms_ratio(ours, oracle) < 1e-5


def expiring(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spans: Tensor) -> Tensor:
    options = ScoreOptions(D**-0.5, spans=spans, ramp=5.0, sinks=sinks)
    return planned_attention(q, k, v, EXPIRING, options, "native", numbers=[N])


@pytest.mark.parametrize("width", [D, 8, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plan_by_rule(width: int, dtype: torch.dtype) -> None:
    tensors = [*inputs(width, dtype=dtype), (torch.rand(2, 1, N, dtype=dtype) * 20).requires_grad_()]
    out = expiring(*tensors)
    q, k, v, sinks, spans = tensors
    options = ScoreOptions(D**-0.5, spans=spans, ramp=5.0, sinks=sinks)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    expected, _ = dense_attention(q.double(), k.double(), v.double(), causal, options)
    upstream = draw(*out.shape, seed=9, dtype=dtype).detach()
    grads = torch.autograd.grad(out, tensors, upstream)
    wanted = torch.autograd.grad(expected, tensors, upstream.double())
    for ours, oracle in zip((out, *grads), (expected, *wanted), strict=True):
        assert rms_ratio(ours, oracle) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("width", [D, 8, 24])
def test_decoding_is_differentiable_in_the_sinks(width: int) -> None:
    q, k, v, sinks = inputs(width, dtype=torch.float64)
    q = q[:, :, -3:].detach().requires_grad_()
    index = torch.tensor([[0, 5, 30, -1], [1, 2, 3, 38], [-1] * 4])[None, None]
    options = ScoreOptions(D**-0.5, sinks=sinks)
    counts = torch.zeros(2, HEADS, 3, N, dtype=torch.long)
    for row in range(2):
        counts[:, :, row, index[0, 0, row][index[0, 0, row] >= 0]] = 1
    tensors = (q, k, v, sinks)
    out = decode_attention(q, k, v, index, options)
    expected, _ = dense_attention(q, k, v, counts, options)
    upstream = draw(*out.shape, seed=9, dtype=torch.float64).detach()
    pairs = zip(
        (out, *torch.autograd.grad(out, tensors, upstream)),
        (expected, *torch.autograd.grad(expected, tensors, upstream)),
        strict=True,
    )
    assert all(rms_ratio(ours, oracle) < 1e-12 for ours, oracle in pairs)
    assert not out[:, :, 2].any()


def test_the_oracle_is_the_plain_loops() -> None:
    q, k, v, sinks = (x.double() for x in inputs(D, batch=1))
    counts = dense_multiplicity(CONFIG, whole_geometry(N, HEADS, 0, True))
    out, lse = dense_attention(q, k, v, counts, ScoreOptions(D**-0.5, sinks=sinks))
    assert rms_ratio(out[0], by_loops(q[0], k[0], v[0], sinks, counts > 0)) < 1e-12
    plain, before = dense_attention(q, k, v, counts, ScoreOptions(D**-0.5))
    ours, joined = with_sinks(plain, before, sinks)
    assert rms_ratio(ours, out) < 1e-12
    assert rms_ratio(joined, lse) < 1e-12


@pytest.mark.parametrize("size", [-1e4, 60.0, 1e4])
def test_sinks_of_any_size_and_rows_without_a_key(size: float) -> None:
    out, lse = torch.ones(1, 2, 3, 4), torch.tensor([[[0.0, 50.0, -torch.inf]] * 2])
    out[:, :, 2] = 0
    sinks = torch.full((2,), size)
    ours, joined = with_sinks(out, lse, sinks)
    gradient = sinks_gradient(ours, joined, torch.ones_like(out), sinks)
    assert torch.isneginf(joined[..., 2]).all()
    assert not ours[:, :, 2].any()
    assert gradient is not None
    assert torch.isfinite(ours).all()
    assert torch.isfinite(gradient).all()
    assert torch.equal(ours, out) == (size < 0)
    assert (gradient < 0).all() == (size == 60.0)


def test_compiled_calls_get_the_same_gradients() -> None:
    q, k, v, sinks = inputs(8)
    spans = (torch.rand(2, 1, N) * 20).requires_grad_()
    whole = Sequences.full(2, N, N)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, spans: Tensor) -> Tensor:
        return static(q, k, v, sinks, whole, "native") + expiring(q, k, v, sinks, spans)

    tensors = (q, k, v, sinks, spans)
    results = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        out = call(*tensors)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_function_transforms(shared: bool) -> None:
    """One set of sinks for all samples, or one for each."""
    q, k, v, sinks = (x.detach() for x in inputs(D))
    spans = torch.rand(2, 1, N) * 20
    each = sinks if shared else torch.stack([sinks, 2 * sinks])

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, spans: Tensor) -> Tensor:
        one = Sequences.full(1, N, N)
        q, k, v, spans = (x[None] for x in (q, k, v, spans))
        return (static(q, k, v, sinks, one, "native") + expiring(q, k, v, sinks, spans)).square().sum()

    grad = func.grad(loss, argnums=(0, 1, 2, 3))
    mapped = func.vmap(grad, in_dims=(0, 0, 0, None if shared else 0, 0))(q, k, v, each, spans)
    for row in range(2):
        alone = grad(q[row], k[row], v[row], sinks if shared else each[row], spans[row])
        for ours, expected in zip(mapped, alone, strict=True):
            assert rms_ratio(ours[row], expected) < 1e-5


def test_means_of_several_softmaxes_refuse_sinks() -> None:
    q, k, v, sinks = inputs(D)
    members = torch.zeros(2, HEADS, 4, dtype=torch.long)
    with pytest.raises(SparseAttentionError, match=r"'members' gives means.*bigbird"):
        planned_attention(
            q, k, v, MEMBERS, ScoreOptions(0.25, sinks=sinks), "native", tensors=(members, members),
            numbers=[None, -1, -1], mean_slots=4,
        )  # fmt: skip
    spec = LayerSpec(3, 4, HEADS, KV_HEADS, D, HEADS * D, causal=False, sinks=True)
    with pytest.raises(SparseAttentionError, match=r"attention sinks of layer 3.*'bigbird'"):
        RoutingAttentionConfig(num_clusters=4).check_layer(spec)
    RoutingAttentionConfig(num_clusters=4).check_layer(replace(spec, causal=True))


@pytest.mark.parametrize("local", [0, 2])
def test_heads_of_a_layer_keep_their_own_sinks(local: int) -> None:
    """Routing splits the heads: with one cluster over everything, and a local window over everything, it is dense."""
    q, k, v, sinks = inputs(8)
    config: Any = RoutingAttentionConfig(num_clusters=1, window=N, num_local_heads=local, local_window=N)
    child = config.build(LayerSpec(0, 1, HEADS, KV_HEADS, D, HEADS * D, causal=True, sinks=True)).eval()
    call = AttentionInputs(q, k, v, Sequences.full(2, N, N), True, D**-0.5, sinks=sinks)
    expected, _ = dense_attention(
        q, k, v, torch.ones(N, N, dtype=torch.bool).tril(), ScoreOptions(D**-0.5, sinks=sinks)
    )
    assert rms_ratio(child(call), expected) < 1e-5


def test_spans_of_a_layer_with_sinks_and_narrow_values() -> None:
    """Through a batch with padding, group by group."""
    q, k, v, sinks = inputs(8)
    config = ExpireSpanAttentionConfig(max_span=20, ramp=4, initial_span=9)
    child = config.build(LayerSpec(0, 1, HEADS, KV_HEADS, D, HEADS * D, causal=True, sinks=True)).eval()
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :11] = 0
    hidden = draw(2, N, HEADS * D, seed=5)
    whole = Sequences.from_mask(2, N, N, mask, None)
    out = child(AttentionInputs(q, k, v, whole, True, D**-0.5, sinks=sinks, hidden_states=hidden))
    alone = child(
        AttentionInputs(
            q[1:, :, 11:], k[1:, :, 11:], v[1:, :, 11:], Sequences.full(1, N - 11, N - 11), True, D**-0.5, sinks=sinks,
            hidden_states=hidden[1:, 11:],
        )
    )  # fmt: skip
    assert out.shape == (2, HEADS, N, 8)
    assert rms_ratio(out[1:, :, 11:], alone) < 1e-5
