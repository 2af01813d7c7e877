"""The C++ decode kernel against torch's operators in fp64: lists, options, layouts of the cache, threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_hf import SparseAttentionError
from sa_hf.ops.choice import CPP, TILES, TRITON, choose_decoder
from sa_hf.ops.cpp import CppEngine
from sa_hf.ops.cpp.steps import Labelled, Listed, decode_step
from sa_hf.ops.decode import decode_attention, runs_in_place
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.reads import Reads, Row, Run, RunLists, positions_of, runs_of
from sa_hf.ops.triton import TritonEngine

BATCH, HEADS, KEY_HEADS, N = 2, 4, 2, 700
pytestmark = pytest.mark.skipif(
    CPP.unsupported(torch.zeros(1), ScoreOptions(1.0)) is not None, reason="the C++ kernels are not there"
)


def tensors(queries: int = 2, dim: int = 64, value_dim: int = 64, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, HEADS, queries, dim), (BATCH, KEY_HEADS, N, dim), (BATCH, KEY_HEADS, N, value_dim)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def lists(heads: int, queries: int = 2, width: int = 300) -> Tensor:
    """Random positions, some of them twice, some places empty."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(N, (BATCH, heads, queries, width), generator=generator)
    return index.masked_fill(torch.rand(index.shape, generator=generator) < 0.2, -1)


def exact(q: Tensor, k: Tensor, v: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
    """By torch's operators in fp64."""
    wide = {name: getattr(options, name) for name in ("distance_bias", "spans", "sinks")}
    options = replace(options, **{name: None if x is None else x.double() for name, x in wide.items()})
    return decode_attention(q.double(), k.double(), v.double(), index, options, "torch")


def check(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).square().mean().sqrt() < bound * want.square().mean().sqrt()


def some_options(kind: str) -> ScoreOptions:
    generator = torch.Generator().manual_seed(2)
    fields: dict[str, Any] = {
        "plain": {},
        "softcap": {"softcap": 2.0},
        "bias": {"distance_bias": torch.randn(HEADS, 2 * 50 - 1, generator=generator)},
        "spans": {"spans": torch.rand(BATCH, 1, N, generator=generator) * 400, "ramp": 64.0},
        "spans by head": {"spans": torch.rand(BATCH, HEADS, N, generator=generator) * 400, "ramp": 64.0},
        "sinks": {"sinks": torch.randn(HEADS, generator=generator) * 4},
    }
    return ScoreOptions(0.125, **fields[kind])


@pytest.mark.parametrize("kind", ["plain", "softcap", "bias", "spans", "spans by head", "sinks"])
@pytest.mark.parametrize("heads", [1, KEY_HEADS, HEADS])
def test_lists_and_options(kind: str, heads: int) -> None:
    q, k, v = tensors()
    index, options = lists(heads), some_options(kind)
    assert runs_in_place(q, k, v, options, "native")
    check(decode_attention(q, k, v, index, options, "native"), exact(q, k, v, index, options))


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (40, 72), (7, 130), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widths_and_dtypes(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    q, k, v = tensors(dim=dim, value_dim=value_dim, dtype=dtype)
    out = decode_attention(q, k, v, lists(1), ScoreOptions(0.1), "native")
    assert out.dtype == dtype
    check(out, exact(q, k, v, lists(1), ScoreOptions(0.1)), 1e-5 if dtype == torch.float32 else 4e-3)


def test_subnormal_and_large_half_precision_keys() -> None:
    q, k, v = tensors(dtype=torch.float16)
    v[:, :, ::3], v[:, :, 1::3] = 3e-6, 6e4  # below the smallest normal number, near the largest
    check(
        decode_attention(q, k, v, lists(1), ScoreOptions(0.1), "native"),
        exact(q, k, v, lists(1), ScoreOptions(0.1)),
        2e-3,
    )


def test_rows_without_a_key_are_zero_and_nan_stays_nan() -> None:
    q, k, v = tensors()
    index = lists(1)
    index[0, :, 1] = -1
    for options in (some_options("plain"), some_options("sinks")):
        out = decode_attention(q, k, v, index, options, "native")
        assert torch.equal(out[0, :, 1], torch.zeros_like(out[0, :, 1]))
        check(out, exact(q, k, v, index, options))
    k[1, 0, int(index[1, 0, 0].max())] = torch.nan
    out = decode_attention(q, k, v, index, some_options("plain"), "native")
    assert out[1, :2, 0].isnan().all()
    assert not out[1, 2:].isnan().any()


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_share_one_row(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long row of one lane is split between threads."""
    q, k, v = (x[:1, :1].repeat(1, 1, 1, 4) for x in tensors(queries=1))
    index = torch.arange(N).repeat(12)[None, None, None]
    options = ScoreOptions(0.1, sinks=torch.ones(1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check(decode_attention(q, k, v, index, options, "native"), exact(q, k, v, index, options))


def one_row(runs: list[Run], position: int = N - 1, low: int = 0, **fields: Any) -> Reads:
    return Reads.of([(Row(0, 0, 0, 0, position, low, position + 1), RunLists.of([runs]))], 1, **fields)


def read_by(reads: Reads, **fields: Any) -> list[int]:
    """The positions that a row reads, from values that are one-hot."""
    values = torch.eye(N)[None, None]
    kept = fields.get("kept")
    values = values if kept is None else values[:, :, kept]
    zeros = torch.zeros(1, 1, 1, 8), torch.zeros(*values.shape[:3], 8)
    out = decode_step(*zeros, values, reads, ScoreOptions(1.0), **fields)[0, 0, 0]
    times = out / out[out > 0].min() if bool((out > 0).any()) else out
    return torch.repeat_interleave(torch.arange(N), times.round().long()).tolist()


def test_runs_are_cut_to_what_a_row_may_read() -> None:
    runs = [(3, 9, 1), (10, 690, 97), (650, 900, 1)]
    assert read_by(one_row(runs, position=660)) == [*range(3, 9), *range(10, 660, 97), *range(650, 661)]
    assert read_by(one_row(runs, position=660, low=5)) == [*range(5, 9), *range(10, 660, 97), *range(650, 661)]
    assert read_by(one_row([(4, 6, 1), (5, 8, 2)])) == [4, 5, 5, 7]
    assert read_by(one_row([(0, 9, 4), (600, 900, 1)], position=605, low=2, relative=True)) == [
        2,
        3,
        4,
        5,
        597,
        601,
        605,
    ]
    assert read_by(one_row([(8, 12, 1)], position=10, skip_own=True)) == [8, 9]
    assert read_by(one_row([(10, 12, 1)], position=10, skip_own=True)) == [10]


def test_keys_that_a_cache_kept_are_found_by_their_slots() -> None:
    kept = torch.arange(1, N, 3)
    assert read_by(one_row([(1, 40, 3), (400, 401, 1)]), kept=kept) == [*range(1, 40, 3), 400]
    with pytest.raises(SparseAttentionError, match="dropped a key"):
        read_by(one_row([(1, 3, 1)]), kept=kept)
    with pytest.raises(SparseAttentionError, match="dropped a key"):
        decode_step(
            torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8), one_row([(0, 6, 1)]),
            ScoreOptions(1.0),
        )  # fmt: skip


def test_listed_blocks_join_the_runs() -> None:
    index = torch.tensor([[[[5, -1, 2]]]])
    assert read_by(one_row([(600, 900, 1)], position=602), listed=Listed(index, 4)) == [
        *range(8, 12),
        *range(20, 24),
        600,
        601,
        602,
    ]
    assert read_by(one_row([], position=21), listed=Listed(index, 4)) == [*range(8, 12), 20, 21]


def test_a_row_reads_the_last_of_its_label() -> None:
    labels = (torch.arange(N) % 5)[None, None]
    mine = torch.full((1, 1, 1), 3)
    assert read_by(one_row([], position=680), labelled=Labelled(labels, mine, 3)) == [668, 673, 678, 680]
    assert read_by(one_row([], position=680, low=670), labelled=Labelled(labels, mine, 3)) == [673, 678, 680]
    kept = torch.arange(0, N, 2)
    assert read_by(one_row([], position=680), labelled=Labelled(labels[:, :, kept], mine, 3), kept=kept) == [
        658,
        668,
        678,
        680,
    ]


def test_keys_in_the_room_of_a_cache_and_queries_of_a_projection() -> None:
    q, k, v = tensors()
    room = torch.full((BATCH, KEY_HEADS, N + 50, 64), torch.nan)
    room[:, :, :N] = k
    apart = q.transpose(1, 2).contiguous().transpose(1, 2)
    got = decode_attention(apart, room[:, :, :N], v, lists(1), ScoreOptions(0.1), "native")
    check(got, exact(q, k, v, lists(1), ScoreOptions(0.1)))


def test_what_the_kernel_does_not_take_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    assert not runs_in_place(q, k, v, ScoreOptions(0.1), "torch")
    assert not runs_in_place(*(x.double() for x in (q, k, v)), ScoreOptions(0.1), "native")
    assert not runs_in_place(q, k.bfloat16(), v, ScoreOptions(0.1), "native")
    assert not runs_in_place(q.requires_grad_(), k, v, ScoreOptions(0.1), "native")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(CppEngine, "decode", refuse)
    out = decode_attention(q, k, v, lists(1), ScoreOptions(0.1), "native")
    torch.autograd.grad(out.sum(), q)


def test_each_engine_says_whether_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One predicate: who chooses, who reads a cache in place and the error ask it."""
    q, k, v = tensors()
    options, marked, half = ScoreOptions(0.1), q.clone().requires_grad_(), k.bfloat16()
    assert choose_decoder("auto", q, k, v, options) is CPP
    for query, key, said in ((marked, k, "no backward"), (q, half, "bfloat16"), (q.to("meta"), k, "no registered")):
        assert said in str(CPP.cannot_decode(query, key, v, options))
        assert not runs_in_place(query, key, v, options, "native")
        assert choose_decoder("native", query, key, v, options) is TILES
    assert "extra tokens" in str(CPP.cannot_decode(q, k, v, replace(options, extra_tokens=1)))
    monkeypatch.setattr(TritonEngine, "unsupported", lambda *_: None)
    assert choose_decoder("triton", q, k, v, options) is TRITON
    with pytest.raises(SparseAttentionError, match=r"engine 'triton' cannot serve .* no backward; use engine='auto'"):
        choose_decoder("triton", marked, k, v, options)


def test_runs_and_positions_say_the_same() -> None:
    positions = torch.tensor([0, 1, 2, 5, 5, 6, 9])
    assert positions_of(runs_of(positions)).tolist() == positions.tolist()
    assert positions_of([(3, 3, 1)]).tolist() == []
