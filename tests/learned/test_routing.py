"""Routing: both forms against plain loops in fp64, causality, decoding, centroids and their movement."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from learned_cases import Memory, attention_inputs, cosine, draw, layer_spec, padded_and_packed, rms_ratio
from learned_cases import build_routing as build
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from sa_hf.errors import NotStaticError, SparseAttentionError
from sa_hf.hf.forward.rotary import before_rotary
from sa_hf.ops.counts import row_counts
from sa_hf.ops.data_layout import range_layout
from sa_hf.ops.parts import Band, BlockPart
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.clusters import causal_plan
from sa_hf.patterns.routing import RoutingAttentionConfig


def softmax_over(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return torch.softmax(keys @ q * scale, 0) @ values


def causal_oracle(q: Tensor, k: Tensor, v: Tensor, mu: Tensor, scale: float, w: int, left: int | None = None) -> Tensor:
    """One sequence: q ``[H, n, d]``, k, v ``[Hkv, n, d]``, mu ``[Hkv, clusters, d]``."""
    group = q.shape[0] // k.shape[0]
    rows = []
    for h in range(q.shape[0]):
        g = h // group
        of_query, of_key = cosine(q[h], mu[g]).argmax(-1).tolist(), cosine(k[g], mu[g]).argmax(-1).tolist()
        for i in range(q.shape[1]):
            reach = i if left is None else min(i, left)
            mine = [j for j in range(i - reach, i) if of_key[j] == of_query[i]]
            mine = [*mine[max(0, len(mine) - (w - 1)) :], i]
            rows.append(softmax_over(q[h, i], k[g][mine], v[g][mine], scale))
    return torch.stack(rows).view(q.shape)


def balanced_oracle(
    q: Tensor, k: Tensor, v: Tensor, mu: Tensor, scale: float, w: int, local_window: int | None, band: Band = Band()
) -> Tensor:
    """One sequence of the published form; ``local_window`` None: tokens in no cluster get 0."""
    group, n = q.shape[0] // k.shape[0], q.shape[1]
    inside = [[j for j in range(n) if band.left is None or -band.right <= i - j <= band.left] for i in range(n)]
    rows = []
    for h in range(q.shape[0]):
        g = h // group
        of_query, of_key = cosine(q[h], mu[g]).detach(), cosine(k[g], mu[g]).detach()
        results: list[list[Tensor]] = [[] for _ in range(n)]
        for c in range(mu.shape[1]):
            queries = sorted(range(n), key=lambda i: (-float(of_query[i, c]), i))[:w]
            keys = set(sorted(range(n), key=lambda j: (-float(of_key[j, c]), j))[:w])
            for i in queries:
                mine = [j for j in inside[i] if j in keys]
                if mine:
                    results[i].append(softmax_over(q[h, i], k[g][mine], v[g][mine], scale))
        for i in range(n):
            if results[i]:
                rows.append(torch.stack(results[i]).mean(0))
            elif local_window is None:
                rows.append(torch.zeros_like(q[h, i]) + 0 * q[h, i])
            else:
                mine = [j for j in inside[i] if abs(i - j) < local_window]
                rows.append(softmax_over(q[h, i], k[g][mine], v[g][mine], scale))
    return torch.stack(rows).view(q.shape)


def check_gradients(out: Tensor, expected: Tensor, leaves: list[Tensor], exact: list[Tensor]) -> None:
    assert rms_ratio(out, expected) < 1e-5
    upstream = draw(*out.shape, seed=9)
    ours = torch.autograd.grad((out * upstream).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((expected * upstream).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert rms_ratio(a, b) < 1e-5 or float(a.abs().max()) < 1e-5 > 1e8 * float(b.abs().max())


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [1, 2, 70])
@pytest.mark.parametrize("window", [1, 7, 100])
@pytest.mark.parametrize("left", [None, 20])
def test_causal_matches_the_oracle(kv_heads: int, length: int, window: int, left: int | None) -> None:
    module = build(4, kv_heads, causal=True, window=window)
    inputs = attention_inputs(1, 4, kv_heads, length, causal=True, band=Band(left, None))
    leaves = [inputs.query, inputs.key, inputs.value]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = causal_oracle(*(x[0] for x in exact), module.centroids.double(), inputs.scale, window, left)
    check_gradients(module(inputs), expected[None], leaves, exact)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("length", "window"), [(1, None), (2, 5), (70, 9), (70, None)])
@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("band", [Band(), Band(15, 10)])
def test_bidirectional_matches_the_oracle(
    kv_heads: int, length: int, window: int | None, fallback: bool, band: Band
) -> None:
    module = build(4, kv_heads, window=window, fallback_local=fallback)
    inputs = attention_inputs(1, 4, kv_heads, length, band=band)
    leaves = [inputs.query, inputs.key, inputs.value]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    w = min(length, window or max(1, math.ceil(length / 4)))
    expected = balanced_oracle(
        *(x[0] for x in exact), module.centroids.double(), inputs.scale, w, 3 if fallback else None, band
    )
    check_gradients(module(inputs), expected[None], leaves, exact)


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_over_everything_is_dense(causal: bool) -> None:
    module = build(num_clusters=1, window=64, causal=causal)
    inputs = attention_inputs(length=64, causal=causal)
    dense = torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=causal)
    assert rms_ratio(module(inputs), dense) < 1e-5


def test_a_token_changes_no_earlier_output() -> None:
    """The trap: in the published form a future token displaces a past one."""
    module = build(2, causal=True)
    inputs = attention_inputs(batch=1, length=40, causal=True)
    before = module(inputs).detach()
    published = build(2)
    whole = attention_inputs(batch=1, length=40)
    unsafe = published(whole).detach()
    changed = 0
    for t in (39, 20):
        for call in (inputs, whole):
            for tensor in (call.query, call.key, call.value):
                tensor.data[:, :, t] = draw(1, 2, 16, seed=t)
        after = module(inputs)
        assert torch.equal(before[:, :, :t], after[:, :, :t])
        assert not torch.equal(before[:, :, t:], after[:, :, t:])
        before = after.detach()
        changed += int((published(whole)[:, :, :t] != unsafe[:, :, :t]).any())
    assert changed  # the test sees the trap where it is


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_packing_equal_each_sequence_alone(causal: bool) -> None:
    module = build(2, causal=causal, window=None if not causal else 5, num_local_heads=1)
    inputs = attention_inputs(batch=3, length=24, causal=causal, sequences=padded_and_packed())
    out = module(inputs)
    assert float(out[0, :, :7].detach().abs().max()) == 0
    for row, slots in ((0, range(7, 24)), (1, range(15)), (2, [0, 1, 2, *range(4, 9), 10, 11]), (2, range(12, 24))):
        at = torch.tensor(list(slots))
        alone = copy.copy(inputs)
        alone.query, alone.key, alone.value = (
            x[row : row + 1, :, at] for x in (inputs.query, inputs.key, inputs.value)
        )
        alone.sequences = Sequences.full(1, len(at), len(at))
        assert rms_ratio(out[row : row + 1, :, at], module(alone)) < 1e-6


@pytest.mark.parametrize("shared_qk", [False, True])
def test_decoding_reproduces_the_forward_and_expired_keys_are_never_read(shared_qk: bool) -> None:
    module = build(4, 4 if shared_qk else 2, causal=True, window=3, num_local_heads=2, shared_qk=shared_qk).eval()
    inputs = attention_inputs(2, 4, 4 if shared_qk else 2, 40, causal=True)
    whole = module(inputs)
    expired = module.expired_keys()
    memory, outs, begin = Memory(), [], 0
    for end in (25, 26, 27, 30, 31, 40):
        step = copy.copy(inputs)
        step.query, step.sequences, step.remember = (
            inputs.query[:, :, begin:end],
            Sequences.full(2, end - begin, end),
            memory,
        )
        step.key, step.value = inputs.key[:, :, :end], inputs.value[:, :, :end]
        outs.append(module(step))
        begin = end
    assert rms_ratio(torch.cat(outs, dim=2), whole) < 1e-5
    assert expired is not None
    assert expired.any()
    assert not expired.all()
    with_more = attention_inputs(2, 4, 4 if shared_qk else 2, 60, causal=True)
    for name in ("query", "key", "value"):
        getattr(with_more, name).data[:, :, :40] = getattr(inputs, name).detach()
    later = module(with_more)[:, :, 40:]
    value = torch.autograd.grad(later.square().sum(), with_more.value)[0][:, :, :40].abs().amax((1, 3))
    assert float(value[expired].max()) == 0


def rotated(x: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``x [B, H, N, d]`` turned as in Llama, and the angles."""
    d = x.shape[-1]
    angle = positions[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    cos, sin = (f(torch.cat([angle, angle], -1))[None].expand(x.shape[0], -1, -1) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None], (cos, sin)


def test_a_shift_of_all_positions_changes_no_cluster() -> None:
    module = build(2, causal=True)
    plain = attention_inputs(length=30, causal=True)
    expected = module.gather
    seen = []
    module.gather = lambda q, k, clusters, real: (seen.append(clusters), expected(q, k, clusters, real))[1]
    for shift in (None, 0.0, 17.0):
        call = copy.copy(plain)
        if shift is not None:
            call.query, angles = rotated(plain.query, torch.arange(30) + shift)
            call.key, _ = rotated(plain.key, torch.arange(30) + shift)
            call.before_rotary = partial(
                before_rotary, LlamaAttention(LlamaConfig(hidden_size=32, num_attention_heads=2), 0), angles
            )
        module(call)
    for clusters in seen[1:]:
        assert torch.equal(clusters[0], seen[0][0])
        assert torch.equal(clusters[1], seen[0][1])


def test_local_heads_and_shared_keys() -> None:
    module = build(4, num_local_heads=2, shared_qk=True, causal=True)
    inputs = attention_inputs(1, 4, length=30, causal=True)
    out = module(inputs)[0]
    q, k, v = (x[0].double() for x in (inputs.query, inputs.key, inputs.value))
    expected = causal_oracle(q[2:], q[2:], v[2:], module.centroids.double(), inputs.scale, 5)
    assert module.centroids.shape[0] == 2
    assert rms_ratio(out[2:], expected) < 1e-5
    for h in range(2):
        for i in (0, 1, 29):
            mine = list(range(max(0, i - 2), i + 1))
            assert rms_ratio(out[h, i], softmax_over(q[h, i], k[h][mine], v[h][mine], inputs.scale)) < 1e-5


def test_cost_is_linear_in_length_times_window() -> None:
    counts = {}
    for n in (2048, 8192):
        query, key = (torch.randint(8, (1, 2, n), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
        parts = causal_plan(query, key, 64, None)
        part = parts[1]
        assert isinstance(part, BlockPart)
        counts[n] = int(part.layout.row_start[-1])
        assert int(row_counts(parts[:1], n, 2).max()) == 1
    assert counts[8192] < 4.4 * counts[2048]
    assert counts[8192] <= 2 * (8192 // 64) * (64 // 64 + 3)


@pytest.mark.parametrize("causal", [False, True])
def test_lists_of_fixed_capacity_give_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs: no length is read from the device, and spare entries belong to no row."""
    module = build(4, 2, causal=causal, window=9)
    inputs = attention_inputs(2, 4, 2, 90, causal=causal)
    leaves = (inputs.query, inputs.key, inputs.value)
    expected = module(inputs)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for where in ("sa_hf.ops.data_layout", "sa_hf.patterns.clusters"):
        monkeypatch.setattr(f"{where}.exact_lists", lambda device: False)
    out = module(inputs)
    assert rms_ratio(out, expected) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), leaves), wanted, strict=True):
        assert rms_ratio(ours, theirs) < 1e-6


def test_capacity_cannot_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa_hf.ops.data_layout.exact_lists", lambda device: False)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        n, width = (int(torch.randint(1, top, (), generator=generator)) for top in (700, 300))
        high = torch.randint(0, n + 1, (1, 1, n), generator=generator).sort().values
        layout = range_layout((high - width).clamp(min=0), high, n, width)
        assert int(layout.row_start[-1]) <= len(layout.columns)


def test_warning_where_it_costs_more_than_dense() -> None:
    module = build(window=40, num_clusters=7)
    with pytest.warns(UserWarning, match="window=None"):
        module(attention_inputs(length=41))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(window=None, num_clusters=7)(attention_inputs(length=41))


def test_errors() -> None:
    for bad in (
        {"num_clusters": 0}, {"window": 0}, {"num_local_heads": -1}, {"local_window": 0}, {"decay": 1.5},
        {"commitment_coef": -1.0}, {"reseed_after": 0}, {"shared_qk": 1}, {"drop_diagonal": True},
    ):  # fmt: skip
        with pytest.raises(SparseAttentionError, match=next(iter(bad))):
            RoutingAttentionConfig(**bad)
    with pytest.raises(SparseAttentionError, match="shared_qk"):
        RoutingAttentionConfig(shared_qk=True).build(layer_spec(4, 2))
    with pytest.raises(SparseAttentionError, match="nearest: 2"):
        RoutingAttentionConfig(num_local_heads=3).build(layer_spec(4, 2))
    with pytest.raises(NotStaticError):
        RoutingAttentionConfig().mask(8)
    preset = RoutingAttentionConfig.preset("enwik8")
    assert (preset.num_clusters, preset.window) == (16, 512)
