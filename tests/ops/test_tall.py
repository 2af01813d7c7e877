"""Rows of tiles that read the same keys, joined: the same pairs, and only where it pays."""

from __future__ import annotations

import pytest
import torch
from ops_cases import BLOCK, compare, random_layout_part, window_part
from torch import Tensor

from sa_hf.ops.layout import build_layout
from sa_hf.ops.native import tall
from sa_hf.ops.parts import Band, BlockPart
from sa_hf.ops.reference import part_multiplicity

pytestmark = pytest.mark.usefixtures("cpu_path")


def staircase_part(n: int, heads: int, step: int, band: Band = Band(None, 0)) -> BlockPart:
    """Row ``i`` reads the first keys of the runs of ``step`` before its own, another number of them for each head."""

    def predicate(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < i // step * (head + 2)) & (j < n)

    return BlockPart(build_layout(predicate, n, n, heads=heads, block=BLOCK, band=band))


def columns_part(n: int, keys: int) -> BlockPart:
    def predicate(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < keys).expand(torch.broadcast_shapes(i.shape, j.shape))

    return BlockPart(build_layout(predicate, n, n, heads=1, block=BLOCK))


# 1,000 slots are 63 tiles of 16: neither 16 nor 4 divides them, and the last is short.
@pytest.mark.parametrize("n", [1000, 1024])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_same_pairs(n: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tall, "WASTE", 1e9)
    parts = [
        staircase_part(n, heads, 100), random_layout_part(n, heads), window_part(n, Band(40, 3)), columns_part(n, 70)
    ]  # fmt: skip
    for part in parts:
        layout = tall.taller(part.layout)
        assert layout.block_q == 16 * BLOCK
        before, after = (part_multiplicity(BlockPart(x), n, n).expand(1, heads, n, n) for x in (part.layout, layout))
        assert torch.equal(before, after)
        assert tall.taller(part.layout) is layout


def test_joined_only_where_little_more_is_computed() -> None:
    n = 1024
    assert tall.taller(columns_part(n, 70).layout).block_q == 16 * BLOCK
    assert tall.taller(staircase_part(n, 1, 256).layout).block_q == 16 * BLOCK
    for part in (random_layout_part(n, 2), window_part(n, Band(40, 0))):
        assert tall.taller(part.layout) is part.layout


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_engine_runs_them(kv_heads: int) -> None:
    part = staircase_part(1000, 2, 200)
    assert tall.taller(part.layout) is not part.layout
    result = compare([part, window_part(1000, Band(40, 0))], kv_heads=kv_heads, query_length=1000, key_length=1000)
    assert result.worst() < 1e-5, result.errors
