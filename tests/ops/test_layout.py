"""Block lists against brute force: which tiles are listed, which are full, what the masks hold; and key counts."""

from __future__ import annotations

import pytest
import torch
from ops_cases import part_cases, random_layout_part
from torch import Tensor

from sa_hf.ops.counts import kept_pairs, row_counts
from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import BAND, FULL, Band, BlockLayout, BlockPart
from sa_hf.ops.reference import part_multiplicity

BLOCK = 16
BANDS = (Band(), Band(None, 0), Band(20, 0), Band(7, 7), Band(40, 3))


def kept_by_loops(table: Tensor, band: Band, query_positions: list[int], key_positions: list[int]) -> Tensor:
    kept = torch.zeros(len(table), len(query_positions), len(key_positions), dtype=torch.bool)
    for a, i in enumerate(query_positions):
        for b, j in enumerate(key_positions):
            inside = (band.left is None or i - j <= band.left) and (band.right is None or j - i <= band.right)
            kept[:, a, b] = table[:, i, j] & inside
    return kept


def lookup(table: Tensor):  # type: ignore[no-untyped-def]
    def predicate(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        head, i, j = torch.broadcast_tensors(head, i, j)
        return table[head, i.clamp(min=0), j.clamp(min=0)]

    return predicate


def check_layout(layout: BlockLayout, kept: Tensor) -> None:
    """Every listed tile has a pair, no tile with a pair is left out, FULL tiles keep all, columns ascend."""
    heads, queries, keys = kept.shape
    assert torch.equal(part_multiplicity(BlockPart(layout), queries, keys)[0].bool(), kept)
    for head in range(heads):
        for block in range(layout.num_query_blocks):
            row = head * layout.num_query_blocks + block
            listed = layout.columns[layout.row_start[row] : layout.row_start[row + 1]].tolist()
            kinds = layout.kind[layout.row_start[row] : layout.row_start[row + 1]].tolist()
            assert listed == sorted(set(listed))
            for column in range(layout.num_key_blocks):
                tile = kept[head, block * BLOCK : (block + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
                assert (column in listed) == bool(tile.any())
                if column in listed:
                    whole = tile.shape == (BLOCK, BLOCK) and bool(tile.all())
                    assert (kinds[listed.index(column)] == FULL) == whole


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
def test_classification(n: int, band: Band) -> None:
    generator = torch.Generator().manual_seed(n)
    table = torch.rand(2, n, n, generator=generator) < 0.5
    table[:, : n // 2] = True
    layout = build_layout(lookup(table), n, n, heads=2, block=BLOCK, band=band)
    check_layout(layout, kept_by_loops(table, band, list(range(n)), list(range(n))))


@pytest.mark.parametrize("band", BANDS)
def test_queries_behind_a_cache(band: Band) -> None:
    n, offset = 50, 33
    table = torch.rand(1, n, n, generator=torch.Generator().manual_seed(1)) < 0.8
    layout = build_layout(lookup(table), n - offset, n, heads=1, block=BLOCK, band=band, query_offset=offset)
    check_layout(layout, kept_by_loops(table, band, list(range(offset, n)), list(range(n))))


@pytest.mark.parametrize("band", BANDS)
def test_reordered_slots(band: Band) -> None:
    """Given positions (a strided subset): the element masks hold the band."""
    n = 60
    table = torch.rand(1, n, n, generator=torch.Generator().manual_seed(2)) < 0.9
    queries, keys = torch.arange(0, n, 2), torch.arange(1, n, 3)
    layout = build_layout(
        lookup(table), len(queries), len(keys), heads=1, block=BLOCK, band=band, query_positions=queries,
        key_positions=keys,
    )  # fmt: skip
    check_layout(layout, kept_by_loops(table, band, queries.tolist(), keys.tolist()))
    assert layout.band.unbounded


def test_candidates_give_the_same_lists() -> None:
    n = 90
    part = random_layout_part(n, 2)
    kept = part_multiplicity(part, n, n)[0].bool()
    layout = part.layout
    rows = torch.repeat_interleave(torch.arange(len(layout.row_start) - 1), layout.row_start.diff())
    known = torch.stack([rows // layout.num_query_blocks, rows % layout.num_query_blocks, layout.columns.long()], 1)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    given = torch.cat([known[order], known[:3]])
    again = build_layout(lookup(kept), n, n, heads=2, block=BLOCK, band=layout.band, candidates=given)
    for name in ("row_start", "columns", "kind", "masks"):
        assert torch.equal(getattr(again, name), getattr(layout, name)), name


def test_equal_masks_are_stored_once() -> None:
    n = 40 * BLOCK
    layout = build_layout(lambda h, i, j: (i - j).abs() % 7 < 4, n, n, heads=1, block=BLOCK, band=Band(BLOCK, BLOCK))
    assert len(layout.kind) > 100
    # The distance of two blocks has 7 residues per diagonal, and three diagonals meet the band.
    assert len(layout.masks) <= 3 * 7


def test_tiles_of_a_band_store_no_masks() -> None:
    layout = build_layout(
        lambda h, i, j: torch.ones_like(i - j, dtype=torch.bool), 100, 100, heads=1, block=BLOCK, band=Band(60, 0)
    )
    assert len(layout.masks) == 0
    assert set(layout.kind.tolist()) == {FULL, BAND}


# Plans with a batch, or with empty key slots outside segments, belong to data-dependent patterns: not counted.
COUNTED = [
    x
    for x in part_cases(3, 1, 2)
    if x not in ("blocks per sequence, key range", "blocks reordered", "offsets reordered")
]


@pytest.mark.parametrize("n", [1, 2, 17, 65, 130])
@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_the_multiplicity(name: str, n: int) -> None:
    plan = part_cases(n, 1, 2)[name]
    expected = sum(part_multiplicity(part, n, n).expand(1, 2, -1, -1).sum(-1)[0] for part in plan)
    assert torch.equal(row_counts(plan, n, 2), expected)
    assert kept_pairs(plan, n, 2) == int(expected.sum())
