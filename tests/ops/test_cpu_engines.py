"""The engines of the CPU against the fp64 oracle: every part, option, shape; outputs and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ops_cases import BLOCK, compare, loop_multiplicity, part_cases, random_layout_part, window_part
from torch import Tensor

from sa_hf.ops.choice import TILES, choose_engine
from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import BAND, Band, BlockPart, OffsetsPart, ScoreOptions, SegmentPart
from sa_hf.ops.reference import part_multiplicity
from sa_hf.ops.tiles import batches

pytestmark = pytest.mark.usefixtures("cpu_path")

LIMIT = 1e-5
NAMES = list(part_cases(3, 2, 2))
LENGTHS = (1, 2, 7, 63, 64, 65, 200)


def option_cases(batch: int, heads: int, n: int) -> dict[str, ScoreOptions]:
    generator = torch.Generator().manual_seed(n)
    plain = ScoreOptions(scale=0.3)
    bias = torch.randn(heads, 2 * n - 1, generator=generator).requires_grad_()
    spans = (torch.rand(batch, 1, n, generator=generator) * n).requires_grad_()
    head_spans = (torch.rand(batch, heads, n, generator=generator) * n).requires_grad_()
    sinks = torch.randn(heads, generator=generator).requires_grad_()
    dropped = replace(plain, dropout=0.3, seed=torch.tensor(2**40 + 7), sequence_ids=torch.arange(batch) + 3)
    return {
        "softcap": replace(plain, softcap=1.5),
        "bias": replace(plain, distance_bias=bias),
        "bias beside extra tokens": replace(plain, distance_bias=bias, extra_tokens=2),
        "spans": replace(plain, spans=spans, ramp=7.3),
        "spans per head": replace(plain, spans=head_spans, ramp=3.1),
        "sinks": replace(plain, sinks=sinks),
        "dropout": replace(dropped, heads=tuple(range(5, 5 + heads))),
        "all": replace(dropped, softcap=2.0, distance_bias=bias, spans=spans, ramp=7.3, sinks=sinks),
    }


@pytest.mark.parametrize("name", NAMES)
def test_multiplicity_is_the_plain_loops(name: str) -> None:
    """The oracle's own reading of a part, against the docstrings."""
    for part in part_cases(37, 2, 2)[name]:
        expected = loop_multiplicity(part, 2, 2, 37, 37)
        assert torch.equal(part_multiplicity(part, 37, 37).expand(2, 2, -1, -1), expected)
        assert expected.any()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_every_part_at_every_length(name: str, n: int) -> None:
    result = compare(part_cases(n, 2, 2)[name], batch=2, query_length=n, key_length=n)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("name", NAMES)
def test_long(name: str) -> None:
    result = compare(part_cases(1000, 1, 2)[name], query_length=1000, key_length=1000)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 1), (8, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_grouped_queries(name: str, heads: int, kv_heads: int) -> None:
    plan = part_cases(65, 2, heads)[name]
    result = compare(plan, batch=2, heads=heads, kv_heads=kv_heads, query_length=65, key_length=65)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("name", ["blocks per head", "segments causal", "offsets", "union"])
def test_head_dims(name: str, head_dim: int) -> None:
    result = compare(part_cases(130, 1, 2)[name], query_length=130, key_length=130, head_dim=head_dim)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("option", list(option_cases(1, 1, 1)))
@pytest.mark.parametrize("name", NAMES)
def test_options(name: str, option: str) -> None:
    plan = part_cases(65, 2, 4)[name]
    options = option_cases(2, 4, 65)[option]
    result = compare(plan, batch=2, heads=4, kv_heads=2, query_length=65, key_length=65, options=options)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("option", list(option_cases(1, 1, 1)))
def test_queries_behind_a_cache(option: str) -> None:
    """Fewer queries than keys: the positions of bias, spans and dropout start at the offset."""
    n, offset = 60, 41
    plan = [SegmentPart(n - offset, n, n, n, band=Band(None, offset))]
    result = compare(plan, query_length=n - offset, key_length=n, options=option_cases(1, 2, n)[option])
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("name", NAMES)
def test_fp64(name: str) -> None:
    result = compare(part_cases(65, 2, 2)[name], batch=2, query_length=65, key_length=65, dtype=torch.float64)
    assert max(result.errors.values()) < 1e-12, result.errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_rounds_once(name: str, dtype: torch.dtype) -> None:
    """Computed in fp32, so the error is that of rounding the result to the dtype, and of the rounded output in the
    backward: twice and three times the dtype's resolution at most."""
    resolution = torch.finfo(dtype).eps
    result = compare(part_cases(65, 2, 2)[name], batch=2, query_length=65, key_length=65, dtype=dtype)
    assert result.errors["output"] < 2 * resolution
    assert max(result.errors.values()) < 3 * resolution, result.errors


@pytest.mark.parametrize("name", NAMES)
def test_both_engines_give_the_same(name: str) -> None:
    plan = part_cases(130, 2, 2)[name]
    chosen = compare(plan, batch=2, query_length=130, key_length=130)
    plain = compare(plan, batch=2, query_length=130, key_length=130, engine=TILES)
    assert plain.worst() < LIMIT, plain.errors
    assert all(torch.allclose(chosen.tensors[x], plain.tensors[x], atol=1e-5) for x in plain.tensors)


def test_large_causal_segments_with_holes() -> None:
    n = 200
    holes = torch.arange(n)[None, None].clone()
    holes[..., 5] = -1
    for key_index in (None, holes):
        plan = [SegmentPart(n, n, n, n, band=Band(None, 0), key_index=key_index)]
        result = compare(plan, query_length=n, key_length=n)
        assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_rows_of_very_different_lengths(kv_heads: int) -> None:
    """Row ``i`` reads the first keys of the runs of 200 before its own, another number of them for each head."""

    def staircase(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < i // 200 * (head + 2)) & (j < 1000)

    part = BlockPart(build_layout(staircase, 1000, 1000, heads=2, block=BLOCK, band=Band(None, 0)))
    result = compare([part, window_part(1000, Band(40, 0))], kv_heads=kv_heads, query_length=1000, key_length=1000)
    assert result.worst() < LIMIT, result.errors


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_backward_is_deterministic(name: str, option: str) -> None:
    options = {"plain": ScoreOptions(scale=0.3), **option_cases(2, 2, 130)}[option]
    plan = part_cases(130, 2, 2)[name]
    first, second = (compare(plan, batch=2, query_length=130, key_length=130, options=options) for _ in range(2))
    assert all(torch.equal(first.tensors[x], second.tensors[x]) for x in first.tensors)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_before_it_is_written(name: str, option: str) -> None:
    assert torch.empty(3).isnan().all()
    options = {"plain": ScoreOptions(scale=0.3), **option_cases(2, 2, 70)}[option]
    result = compare(part_cases(70, 2, 2)[name], batch=2, query_length=70, key_length=70, options=options)
    assert result.worst() < 10 * LIMIT, result.errors  # gradients that are 0 but for rounding are among them


def test_small_batches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on how the tiles are batched."""
    plan = part_cases(200, 2, 3)["union"]
    large = compare(plan, batch=2, heads=3, kv_heads=3, query_length=200, key_length=200)
    monkeypatch.setattr(batches, "SCORES", 3 * BLOCK * BLOCK)
    small = compare(plan, batch=2, heads=3, kv_heads=3, query_length=200, key_length=200)
    assert small.worst() < LIMIT
    assert all(torch.allclose(large.tensors[x], small.tensors[x], atol=1e-5) for x in large.tensors)


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_in_runs_and_offsets_in_chunks(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows are merged from runs of their keys, fixed offsets go over the rows in chunks."""
    monkeypatch.setattr(batches, "RUN_KEYS", 2 * BLOCK)
    monkeypatch.setattr(batches, "ELEMENTS", 1)
    options = {"plain": ScoreOptions(scale=0.3), **option_cases(2, 4, 130)}[option]
    plan = part_cases(130, 2, 4)[name]
    result = compare(plan, batch=2, heads=4, kv_heads=2, query_length=130, key_length=130, options=options)
    assert result.worst() < LIMIT, result.errors


def test_a_plan_without_parts() -> None:
    result = compare([OffsetsPart(5, ((),))], query_length=5, key_length=5)
    assert not any(x.any() for x in result.tensors.values())


def test_one_layout_serves_other_batches() -> None:
    """The batches of tiles kept with a layout are those of the call's shape."""
    part = random_layout_part(65, 2)
    for batch, kv_heads in ((1, 2), (3, 2), (2, 1), (1, 1), (4, 2), (1, 2)):
        result = compare([part], batch=batch, kv_heads=kv_heads, query_length=65, key_length=65, seed=batch)
        assert result.worst() < LIMIT, result.errors


def test_layouts_are_not_kept_alive() -> None:
    import gc
    import weakref

    part = window_part(65, Band(9, 0))
    compare([part], query_length=65, key_length=65)
    reference = weakref.ref(part.layout)
    del part
    gc.collect()
    assert reference() is None


def test_torchs_operators_serve_everything() -> None:
    query, options = torch.zeros(1, 1, 1, 8), ScoreOptions(scale=1.0, softcap=2.0)
    assert TILES.unsupported(query, options) is None
    assert choose_engine("torch", query, options) is TILES
    assert choose_engine("native", query.double(), options) is TILES


def test_blocks_of_two_sizes() -> None:
    """block_q and block_k of a layout may differ."""
    part = window_part(96, Band(None, None))
    layout = part.layout
    wide = replace(
        layout,
        block_k=2 * BLOCK,
        row_start=torch.arange(0, 19, 3),
        columns=torch.arange(3, dtype=torch.int32).repeat(6),
        kind=torch.full((18,), BAND, dtype=torch.int32),
        masks=torch.zeros(0, BLOCK, 2 * BLOCK, dtype=torch.bool),
        band=Band(30, 4),
    )
    result = compare([BlockPart(wide)], query_length=96, key_length=96)
    assert result.worst() < LIMIT, result.errors


def test_segments_of_one_with_fewer_keys_and_an_empty_one() -> None:
    """The last query has no key slot, the first an empty one: both have nothing to attend."""
    plan = [
        SegmentPart(
            3, 2, 1, 1, query_index=torch.arange(3).expand(1, 2, 3), key_index=torch.tensor([-1, 1]).expand(1, 2, 2)
        )
    ]
    result = compare(plan, query_length=3, key_length=3)
    assert result.worst() < LIMIT, result.errors
