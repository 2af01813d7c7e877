"""The C++ kernels where they have cases of their own: large tiles, odd head sizes, threads, extreme scores, views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ops_cases import compare, part_cases, shuffled, window_part
from torch import Tensor

from sa_hf.ops.choice import CPP, choose_engine
from sa_hf.ops.cpp import kernels, sources
from sa_hf.ops.engine import Gradients
from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import BAND, FULL, Band, BlockLayout, BlockPart, OffsetsPart, Part, ScoreOptions, SegmentPart
from sa_hf.ops.run import plan_backward, plan_forward

LIMIT = 1e-5
PLAIN = ScoreOptions(scale=0.3)

CANNOT = CPP.unsupported(torch.zeros(1, 1, 1, 16), PLAIN)

pytestmark = pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def speckled(n: int, heads: int, block: int, band: Band) -> BlockPart:
    """Tiles of every kind: full, empty, and with irregular masks."""

    def predicate(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i // 50 == j // 50) | ((i * 7 + j * 13 + head) % 11 == 0) & (j > 150)
        return (near | (j < 70)) & band.contains(i, j)

    return BlockPart(build_layout(predicate, n, n, heads=heads, block=block, band=band))


@pytest.mark.parametrize("n", [64, 130, 333])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("band", [Band(None, 0), Band()], ids=["causal", "full"])
def test_tiles_of_every_size(block: int, n: int, band: Band) -> None:
    result = compare([speckled(n, 2, block, band), window_part(n, Band(100, 20))], query_length=n, key_length=n)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 72, 88, 200, 256])
def test_every_head_dim(head_dim: int) -> None:
    rows, columns = shuffled(150, 2, 1, empty=3), shuffled(150, 2, 2, empty=3)
    listed = SegmentPart(150, 150, 70, 70, band=Band(None, 0), query_index=rows, key_index=columns)
    offsets = OffsetsPart(150, ((0, 1, 2, 70), (5, -3)), 2, query_index=columns, key_index=rows)
    for plan in ([speckled(150, 2, 64, Band(None, 0))], [listed, window_part(150, Band(9, 9)), offsets]):
        result = compare(plan, query_length=150, key_length=150, head_dim=head_dim)
        assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("band", [Band(None, 0), Band(7, 0), Band(0, 7), Band(90, 3), Band(200, -80), Band(-70, None)])
@pytest.mark.parametrize("segment", [1, 15, 64, 100, 300])
@pytest.mark.parametrize("skip_diagonal", [False, True])
def test_bands_of_segments(segment: int, band: Band, skip_diagonal: bool) -> None:
    part = SegmentPart(300, 300, segment, segment, band=band, skip_diagonal=skip_diagonal)
    result = compare([part], query_length=300, key_length=300)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_any_number_of_offsets(count: int) -> None:
    part = OffsetsPart(200, (tuple(x * x - 30 for x in range(count)),), 7, 190)
    result = compare([part], query_length=200, key_length=200)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("keys", [1, 3, 4, 5])
@pytest.mark.parametrize("band", [Band(), Band(None, 0), Band(0, None)])
@pytest.mark.parametrize("skip_diagonal", [False, True])
def test_segments_of_few_keys(keys: int, band: Band, skip_diagonal: bool) -> None:
    """Of 70, 70 and 10 queries; the last has a key less, and some slots are empty."""
    rows, columns = shuffled(150, 2, 1, empty=3), shuffled(150, 2, 2, empty=60)[..., : 3 * keys - 1]
    part = SegmentPart(150, 3 * keys - 1, 70, keys, band, skip_diagonal, rows, columns)
    result = compare([part, window_part(150, Band(2, 0))], query_length=150, key_length=150)
    assert result.worst() < LIMIT, result.errors


def test_segments_with_fewer_or_more_keys_than_queries() -> None:
    for queries, keys in ((70, 5), (5, 70), (64, 65)):
        part = SegmentPart(3 * queries, 3 * keys, queries, keys, band=Band(None, 3))
        result = compare([part], query_length=3 * queries, key_length=3 * keys)
        assert result.worst() < LIMIT, result.errors


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (3, 3)])
def test_any_number_of_threads(heads: int, kv_heads: int, threads: int) -> None:
    """With few key lanes their gradients are summed in pieces; twice the same, to the bit."""
    bias = torch.randn(heads, 2 * 333 - 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    spans = (torch.rand(1, 1, 333, generator=torch.Generator().manual_seed(1)) * 333).requires_grad_()
    options = replace(PLAIN, distance_bias=bias, spans=spans, ramp=40.0)
    many = OffsetsPart(333, (tuple(range(-20, 20)),), 3, 330)
    plan = [speckled(333, heads, 64, Band(None, 0)), many]
    first, second = (
        compare(plan, heads=heads, kv_heads=kv_heads, query_length=333, key_length=333, options=options)
        for _ in range(2)
    )
    assert first.worst() < LIMIT, first.errors
    assert all(torch.equal(first.tensors[x], second.tensors[x]) for x in first.tensors)


def run(plan: list[Part], q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> tuple[Tensor, Tensor, Gradients]:
    engine = CPP
    out, lse = plan_forward(plan, q, k, v, options, engine)
    return out, lse, plan_backward(plan, q, k, v, out, lse, out + 1, options, engine)


def test_the_output_does_not_depend_on_the_number_of_threads() -> None:
    """The table of what repeats in ``sa_hf/ops/__init__.py``."""
    plan: list[Part] = [speckled(333, 4, 64, Band(None, 0)), OffsetsPart(333, (tuple(range(-20, 20)),), 3, 330)]
    q, k, v = (draw(2, heads, 333, 32, seed=s) for s, heads in enumerate((4, 2, 2)))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(plan_forward(plan, q, k, v, PLAIN, CPP))
    finally:
        torch.set_num_threads(before)
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])


def all_of(result: tuple[Tensor, Tensor, Gradients]) -> list[Tensor]:
    out, lse, grads = result
    return [out, lse, grads.query, grads.key, grads.value]


def test_views_are_read_where_they_lie() -> None:
    """Heads behind tokens, as projections give them, and every other token."""
    n = 100
    plain = [draw(2, 2, n, 32, seed=s) for s in range(3)]
    behind = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    apart = [torch.stack([x, torch.full_like(x, torch.nan)], 3).flatten(2, 3)[:, :, ::2] for x in plain]
    spread = [torch.stack([x, torch.full_like(x, torch.nan)], 4).flatten(3, 4)[..., ::2] for x in plain]
    plan = part_cases(n, 2, 2)["union"]
    expected = all_of(run(plan, *plain, PLAIN))
    for views in (behind, apart, spread):
        assert not any(x.is_contiguous() for x in views)
        assert all(torch.equal(a, b) for a, b in zip(expected, all_of(run(plan, *views, PLAIN)), strict=True))


def test_peaks_that_rise_and_scores_of_any_size() -> None:
    """Each chunk of keys may exceed the last by far more than the slack of the running peak, in both directions."""
    n = 300
    q, k, v = (draw(1, 2, n, 32, seed=s) for s in range(3))
    shuffled_growth = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    for growth in (torch.arange(n), torch.arange(n).flip(0), shuffled_growth):
        steep = k * (1 + growth[:, None] / 3)
        out, lse = plan_forward([SegmentPart(n, n, n, n)], q, steep, v, PLAIN, CPP)
        scores = 0.3 * q.double() @ steep.double().transpose(2, 3)
        assert scores.abs().amax() > 300
        assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5)
        assert torch.allclose(out.double(), scores.softmax(-1) @ v.double(), atol=2e-3)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000], ids=["nan", "nan of CUDA", "-nan", "inf"])
def test_what_is_not_a_number_comes_out_where_it_is_read_and_nowhere_else(bits: int) -> None:
    n = 200
    q, k, v = (draw(1, 1, n, 16, seed=s) for s in range(3))
    q.view(torch.int32)[0, 0, 70, 3] = bits
    assert not q.isfinite().all()
    out, _ = plan_forward([SegmentPart(n, n, n, n, band=Band(None, 0))], q, k, v, PLAIN, CPP)
    bad = ~out.isfinite().all(-1)[0, 0]
    assert bad.nonzero().flatten().tolist() == [70]


def test_the_softcaps_tangent_is_exact_near_0_and_far_from_it() -> None:
    n, cap = 64, 30.0
    q, k = (torch.logspace(-6, 2, n).view(1, 1, n, 1).expand(1, 1, n, 16).contiguous() * s for s in (1.0, -0.5))
    q, k = torch.cat([q, -q], 2), torch.cat([k, k], 2)
    part = SegmentPart(2 * n, 2 * n, 2 * n, 2 * n, band=Band(0, 0))  # one key each: its log-sum-exp is the score
    _, lse = plan_forward([part], q, k, q, ScoreOptions(scale=1.0, softcap=cap), CPP)
    expected = cap * torch.tanh((q.double() * k.double()).sum(-1) / cap)
    assert torch.allclose(lse.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_has_no_say(dtype: torch.dtype) -> None:
    n = 70
    listed = SegmentPart(n, n, 20, 20, query_index=shuffled(n, 2, 1, empty=2), key_index=shuffled(n, 2, 2, empty=2))
    q, k, v = (draw(1, 2, n, 16, seed=s) for s in range(3))
    for plan in ([listed, window_part(n, Band(9, 0))], [window_part(n, Band(9, 0)), listed]):
        expected = all_of(run(plan, q, k, v, PLAIN))
        torch.set_default_dtype(dtype)
        try:
            found = all_of(run(plan, q, k, v, PLAIN))
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_part_of_the_first_queries_leaves_the_others_empty() -> None:
    n = 70
    q, k, v = (draw(1, 1, n, 16, seed=s) for s in range(3))
    full = torch.full_like(q, torch.nan)  # for the allocator to hand out again
    del full
    out, lse = plan_forward([SegmentPart(30, n, 30, n)], q, k, v, PLAIN, CPP)
    assert not out[:, :, 30:].any()
    assert torch.isneginf(lse[:, :, 30:]).all()


def test_shapes_and_dtypes_that_do_not_fit_raise() -> None:
    n = 70
    q, k, v = (draw(1, 2, n, 16, seed=s) for s in range(3))
    part = window_part(n, Band(9, 0))
    for bad in ((q, k, v[..., :8]), (q, k[:, :, :9], v), (q, k[..., :8], v[..., :8]), (q[:, :1], k, v)):
        with pytest.raises(ValueError, match="must have one shape"):
            plan_forward([part], *bad, PLAIN, CPP)
    wrong = BlockPart(replace(part.layout, kind=part.layout.kind.long()))
    with pytest.raises(TypeError, match=r"kind is torch\.int64, and torch\.int32"):
        plan_forward([wrong], q, k, v, PLAIN, CPP)


@pytest.mark.parametrize(("block_q", "block_k"), [(1, 1), (3, 1), (1, 5), (70, 2), (130, 7)])
def test_element_masks_of_any_tile(block_q: int, block_k: int) -> None:
    n = 140
    masks = torch.rand(5, block_q, block_k, generator=torch.Generator().manual_seed(0)) < 0.5
    rows, columns = -(-n // block_q), -(-n // block_k)
    listed = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.6
    layout = BlockLayout(
        n, n, block_q, block_k, 1, 1, torch.nn.functional.pad(listed.sum(1).cumsum(0), (1, 0)),
        listed.nonzero()[:, 1].int(), (torch.arange(int(listed.sum())) % 7 - 2).int(), masks, Band(60, 50),
    )  # fmt: skip
    full = layout.kind == FULL  # not those that the slots' end cuts
    layout.kind[full & ((layout.columns + 1) * block_k > n)] = BAND
    result = compare([BlockPart(layout)], query_length=n, key_length=n)
    assert result.worst() < LIMIT, result.errors


def test_the_switch_and_a_failing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operators serve, and the reason is told."""
    query = draw(1, 1, 4, 16, seed=0)
    try:
        monkeypatch.setenv(kernels.SWITCH, "0")
        kernels._found.cache_clear()
        assert CPP.unsupported(query, PLAIN) == "SA_HF_CPU_KERNELS=0"
        monkeypatch.delenv(kernels.SWITCH)
        monkeypatch.setitem(sources.FILES, "passes.h", "not C++")
        kernels._found.cache_clear()
        assert "error" in str(CPP.unsupported(query, PLAIN))
        serving = choose_engine("native", query, PLAIN)
        assert serving.name == "torch"
        assert serving.forward(SegmentPart(4, 4, 4, 4), query, query, query, PLAIN)[0].isfinite().all()
    finally:
        monkeypatch.undo()
        kernels._found.cache_clear()
    assert CPP.unsupported(query, PLAIN) is None
    assert "float64" in str(CPP.unsupported(query.double(), PLAIN))
    assert "not on meta" in str(CPP.unsupported(query.to("meta"), PLAIN))
