"""``sparse_attention`` of every static pattern: outputs and gradients against the definition, padded and packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pattern_cases import every_case, label
from pattern_definitions import Layer, expected
from torch import Tensor

from sa_hf import (
    BigBirdAttentionConfig,
    LogSparseAttentionConfig,
    LongNetAttentionConfig,
    NotStaticError,
    SlidingWindowAttentionConfig,
    SparseAttentionError,
    SparseTransformerAttentionConfig,
    StarAttentionConfig,
    sparse_attention,
)
from sa_hf.layer import AttentionInputs, Geometry, LayerSpec
from sa_hf.ops.parts import Band
from sa_hf.ops.reference import part_multiplicity
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import StaticPatternConfig, pattern_parts

pytestmark = pytest.mark.filterwarnings("ignore:longnet")

# A pattern's own extra tokens run in a model alone; those of the plans are covered by their tests.
CASES = [config for config in every_case() if config.extra_tokens == 0]
cases = pytest.mark.parametrize("config", CASES, ids=label)
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16


def inputs(batch: int, n: int, seed: int = 0, queries: int | None = None) -> list[Tensor]:
    """Query, key, value and an output gradient, fp32, the first three with gradients on."""
    draw = torch.Generator().manual_seed(seed)
    m = n if queries is None else queries
    shapes = (batch, HEADS, m), (batch, KEY_HEADS, n), (batch, KEY_HEADS, n), (batch, HEADS, m)
    tensors = [torch.randn(*shape, HEAD_DIM, generator=draw) for shape in shapes]
    return [x.requires_grad_(index < 3) for index, x in enumerate(tensors)]


def by_definition(query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
    """Softmax over a multiset in fp64: ``counts [H, n, n]`` times each key; a row without a key is 0."""
    queries = query.shape[2]
    group = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ k.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = counts[:, -queries:].double() * torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total > 0, total, 1.0)) @ v


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of the oracle (at least 0.1: some gradients are 0)."""
    difference, scale = (x.detach().square().mean().sqrt() for x in (got.double() - want, want))
    return float(difference / scale.clamp(min=0.1))


def assert_same(config: StaticPatternConfig, tensors: list[Tensor], oracle: Tensor, **call: object) -> None:
    """Output and all gradients of ``sparse_attention`` against an oracle built on the same leaves."""
    *leaves, grad_out = tensors
    want = torch.autograd.grad(oracle, leaves, grad_out.double())
    out = sparse_attention(*leaves, config, **call)  # type: ignore[arg-type]
    got = torch.autograd.grad(out, leaves, grad_out)
    assert error(out, oracle) < 1e-5
    for name, mine, theirs in zip(("query", "key", "value"), got, want, strict=True):
        assert error(mine, theirs.double()) < 1e-5, name


@cases
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_outputs_and_gradients(config: StaticPatternConfig, causal: bool) -> None:
    for n, layer, drop in ((1, 0, False), (7, 1, True), (65, 0, True), (150, 1, False)):
        chosen = replace(config, drop_diagonal=drop)
        counts = expected(config, tuple(range(HEADS)), Layer(n, causal, HEADS, layer), drop_diagonal=drop)
        tensors = inputs(2, n)
        assert_same(chosen, tensors, by_definition(*tensors[:3], counts), causal=causal, layer_idx=layer)
        reference = sparse_attention(*tensors[:3], chosen, causal=causal, layer_idx=layer, engine="reference")
        assert error(reference, by_definition(*tensors[:3], counts)) < 1e-6


@cases
def test_the_last_queries_of_a_sequence(config: StaticPatternConfig) -> None:
    n, queries = 130, 33
    counts = expected(config, tuple(range(HEADS)), Layer(n, True, HEADS, 0))
    tensors = inputs(1, n, queries=queries)
    assert_same(config, tensors, by_definition(*tensors[:3], counts), causal=True)


@cases
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_padding_is_as_if_cut_out(config: StaticPatternConfig, causal: bool) -> None:
    """Left, right and inner padding in one batch: each row alone, its padding rows 0."""
    n = 80
    mask = torch.ones(3, n, dtype=torch.int64)
    mask[0, :13], mask[1, 50:], mask[2, 20:31] = 0, 0, 0
    tensors = inputs(3, n, seed=1)
    rows = []
    for row in range(3):
        real = torch.nonzero(mask[row]).flatten()
        counts = expected(config, tuple(range(HEADS)), Layer(len(real), causal, HEADS, 0))
        alone = by_definition(*(x[row : row + 1, :, real] for x in tensors[:3]), counts)
        rows.append(torch.zeros(1, HEADS, n, HEAD_DIM, dtype=torch.float64).index_copy(2, real, alone))
    assert_same(config, tensors, torch.cat(rows), causal=causal, attention_mask=mask)


@cases
@pytest.mark.parametrize("drop", [False, True])
def test_extra_tokens_of_another_layer_are_read_by_everything(config: StaticPatternConfig, drop: bool) -> None:
    """They run through the whole stack, so a pattern without any of its own has them in front of its sequences, too."""
    n, extra = 37, 2
    vectors = inputs(2, extra + n)
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, 20:] = 0
    layer = LayerSpec(1, 2, HEADS, KEY_HEADS, HEAD_DIM, HEADS * HEAD_DIM, False)
    sparse = replace(config, drop_diagonal=drop).build(layer)
    sequences = Sequences.from_mask(2, n, n, mask).with_extra_tokens(extra)
    out = sparse(AttentionInputs(*vectors[:3], sequences, False, HEAD_DIM**-0.5))
    gradients = torch.autograd.grad(out, vectors[:3], vectors[3])
    exact = [x.detach().double().requires_grad_() for x in vectors[:3]]
    wanted = []
    for row, length in enumerate((n, 20)):
        counts = expected(config, tuple(range(HEADS)), Layer(length, False, HEADS, 1))
        if drop:  # the extra tokens are another key of every row
            counts = torch.where(torch.eye(length, dtype=torch.bool), 0, counts)
        counts = torch.nn.functional.pad(counts, (extra, 0, extra, 0), value=1)
        alone = by_definition(*(x[row : row + 1, :, : extra + length] for x in exact), counts)
        wanted.append(torch.nn.functional.pad(alone, (0, 0, 0, n - length)))
    whole = torch.cat(wanted)
    assert error(out, whole) < 1e-5
    for got, want in zip(gradients, torch.autograd.grad(whole, exact, vectors[3].double()), strict=True):
        assert error(got, want) < 1e-5


@cases
def test_a_batch_of_padding_is_zero(config: StaticPatternConfig) -> None:
    tensors = inputs(2, 20)
    out = sparse_attention(*tensors[:3], config, attention_mask=torch.zeros(2, 20))
    assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(out, tensors[:3], tensors[3]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_calls_that_would_leave_something_out_raise() -> None:
    query, key, value, _ = inputs(1, 20)
    with pytest.raises(NotStaticError, match=r"conv_kernel_size=3 .*use patch_model, or conv_kernel_size=1"):
        sparse_attention(query, key, value, LogSparseAttentionConfig(conv_kernel_size=3))
    with pytest.raises(SparseAttentionError, match="layer_idx=-1 must be an integer >= 0; nearest: 0"):
        sparse_attention(query, key, value, BigBirdAttentionConfig(), layer_idx=-1)


@cases
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_packed_sequences_do_not_meet(config: StaticPatternConfig, causal: bool) -> None:
    lengths = (33, 1, 46)
    ids = torch.repeat_interleave(torch.tensor([0, 1, 0]), torch.tensor(lengths))[None]
    tensors = inputs(1, sum(lengths), seed=2)
    pieces = []
    for query, key, value in zip(*(x.split(lengths, dim=2) for x in tensors[:3]), strict=True):
        counts = expected(config, tuple(range(HEADS)), Layer(query.shape[2], causal, HEADS, 0))
        pieces.append(by_definition(query, key, value, counts))
    assert_same(config, tensors, torch.cat(pieces, dim=2), causal=causal, sequence_ids=ids)


@cases
def test_changing_a_token_changes_nothing_before_it(config: StaticPatternConfig) -> None:
    query, key, value, _ = inputs(1, 100, seed=3)
    before = sparse_attention(query, key, value, config, causal=True)
    with torch.no_grad():
        for x in (query, key, value):
            x[:, :, 61:] += 1
    after = sparse_attention(query, key, value, config, causal=True)
    assert torch.equal(before[:, :, :61], after[:, :, :61])
    assert not torch.equal(before[:, :, 61:], after[:, :, 61:])


def test_a_row_without_a_key_is_zero_with_zero_gradient() -> None:
    with pytest.warns(UserWarning, match="no branch"):
        config = LongNetAttentionConfig(segment_length=(32,), dilated_ratio=(8,))
    tensors = inputs(1, 32)
    out = sparse_attention(*tensors[:3], config)
    empty = [i for i in range(32) if i % 8 != 1]
    assert torch.equal(out[:, 1, empty], torch.zeros_like(out[:, 1, empty]))
    (grad,) = torch.autograd.grad(out, tensors[0], tensors[3])
    assert torch.equal(grad[:, 1, empty], torch.zeros_like(grad[:, 1, empty]))
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize(
    "config",
    [
        SlidingWindowAttentionConfig(window=70),
        LongNetAttentionConfig(segment_length=(70,), dilated_ratio=(1,)),
        LogSparseAttentionConfig(local_window=70),
        SparseTransformerAttentionConfig(kind="strided", stride=70),
        SparseTransformerAttentionConfig(kind="fixed", stride=128, summary=128),
        BigBirdAttentionConfig(block_size=16, num_random_blocks=5),
    ],
    ids=label,
)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_covering_everything_is_dense_attention(config: StaticPatternConfig, causal: bool) -> None:
    query, key, value, _ = inputs(2, 70)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    assert error(sparse_attention(query, key, value, config, causal=causal), dense.double()) < 1e-5


# -- any configuration ---------------------------------------------------------------------------------------------


def increasing(largest: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(1, largest), min_size=1, max_size=3).map(lambda s: tuple(sorted(s)))


@st.composite
def configs(draw: st.DrawFn) -> StaticPatternConfig:
    """A configuration of any static pattern, also of odd sizes."""
    kind = draw(st.sampled_from(["window", "longnet", "logsparse", "strided", "fixed", "bigbird", "star"]))
    small = st.integers(1, 40)
    drop = draw(st.booleans())
    if kind == "window":
        sinks = draw(st.integers(0, 80))
        return SlidingWindowAttentionConfig(window=draw(small), num_sink_tokens=sinks, drop_diagonal=drop)
    if kind == "longnet":
        w = draw(increasing(90))
        r = draw(increasing(12).filter(lambda r: len(r) <= len(w)))
        offset = draw(st.sampled_from(["modulo", "grouped"]))
        return LongNetAttentionConfig(
            segment_length=w[: len(r)], dilated_ratio=r, head_offset=offset, drop_diagonal=drop
        )
    if kind == "logsparse":
        restart = draw(st.none() | small)
        window = draw(small if restart is None else st.none() | small)
        return LogSparseAttentionConfig(local_window=window, restart_length=restart, drop_diagonal=drop)
    if kind in ("strided", "fixed"):
        stride = draw(small)
        summary = draw(st.integers(1, stride))
        groups = draw(st.integers(1, stride // summary))
        mode = draw(st.sampled_from(["merged", "interleaved", "per_head"]))
        return SparseTransformerAttentionConfig(
            kind=kind, stride=stride, summary=summary, num_summary_groups=groups, head_mode=mode, drop_diagonal=drop
        )
    if kind == "bigbird":
        ends = draw(st.booleans())
        return BigBirdAttentionConfig(
            block_size=draw(st.sampled_from([1, 4, 16, 32, 64, 128])),
            num_window_blocks=draw(st.sampled_from([0, 1, 3, 5])),
            num_random_blocks=draw(st.integers(0, 4)),
            global_blocks="ends" if ends else "first",
            num_global_blocks=draw(st.sampled_from([0, 2, 4])) if ends else draw(st.integers(0, 3)),
            seed=draw(st.integers(0, 2**63 - 1)),
            drop_diagonal=drop,
        )
    relay = draw(st.sampled_from(["token", "virtual"]))
    return StarAttentionConfig(relay=relay, ring=draw(st.booleans()), drop_diagonal=drop)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    config=configs(),
    n=st.integers(1, 150),
    queries=st.integers(1, 150),
    causal=st.booleans(),
    heads=st.sampled_from([(0,), (0, 1, 2), (1, 4)]),
    layer=st.integers(0, 3),
    window=st.none() | st.integers(0, 60),
    block=st.sampled_from([16, 64, 128]),
)
@pytest.mark.filterwarnings("ignore:longnet")
def test_plans_of_any_configuration_are_their_definition(
    config: StaticPatternConfig,
    n: int,
    queries: int,
    causal: bool,
    heads: tuple[int, ...],
    layer: int,
    window: int | None,
    block: int,
) -> None:
    queries = min(n, queries)
    geometry = Geometry(n, queries, heads, 5, layer, causal, Band(window, window), block)
    plain = replace(config, drop_diagonal=False)
    want = expected(plain, heads, Layer(n, causal, 5, layer), window=window, drop_diagonal=config.drop_diagonal)
    got = torch.zeros(len(heads), queries, n, dtype=torch.int64)
    for part in pattern_parts(config, geometry, torch.device("cpu")):
        got += part_multiplicity(part, queries, n)[0]
    assert torch.equal(got, want[:, n - queries :])
    position = n - queries
    keys = config.decode_keys(position, geometry)
    for row, read in zip(want[:, position], keys, strict=True):
        assert read.tolist() == torch.repeat_interleave(torch.arange(n), row).tolist()
