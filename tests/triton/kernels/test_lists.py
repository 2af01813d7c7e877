"""The work lists against lists made tile by tile in Python: many programs, many steps, heads apart and shared."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from sa_hf.ops.parts import BAND, FULL, BlockLayout
from sa_hf.ops.triton import lists as sa_lists
from sa_hf.ops.triton.lists import TileLists, WorkList, layout_lists

pytestmark = pytest.mark.usefixtures("nan_filled")
BLOCK = 16
NQ, NK = 37 * BLOCK - 3, 45 * BLOCK - 5


def some_layout(batch: int, heads: int, longest: int | None) -> BlockLayout:
    """Random tiles, some rows and columns empty, one row and one column whole, room behind the last entry."""
    g = torch.Generator().manual_seed(batch * 10 + heads)
    query_tiles, key_tiles = -(-NQ // BLOCK), -(-NK // BLOCK)
    kept = torch.rand(batch * heads, query_tiles, key_tiles, generator=g) < 0.2
    kept[:, 3], kept[:, :, 7] = True, True
    kept[:, 20:24], kept[:, :, 30] = False, False
    at = torch.nonzero(kept)
    kind = torch.where(torch.rand(len(at), generator=g) < 0.5, FULL, BAND)
    room = torch.full((9,), 5)
    row_start = torch.nn.functional.pad(kept.sum(-1).flatten().cumsum(0), (1, 0))
    return BlockLayout(
        NQ, NK, BLOCK, BLOCK, batch, heads, row_start, torch.cat([at[:, 2], room]).int(),
        torch.cat([kind, room]).int(), torch.zeros(0, BLOCK, BLOCK, dtype=torch.bool), longest=longest,
    )  # fmt: skip


def expected(layout: BlockLayout, name: str, flat: int) -> dict[int, tuple[list[int], list[int]]]:
    """Per row of the work list its full entries and its other ones, in order."""
    found: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    starts = layout.row_start.tolist()
    query_tiles, key_tiles = layout.num_query_blocks, layout.num_key_blocks
    shared = layout.heads == 1
    for repeat in range(flat if shared else 1):
        for source in range(len(starts) - 1):
            list_of, tile = divmod(source, query_tiles)
            batch, head = divmod(list_of, layout.heads)
            for at in range(starts[source], starts[source + 1]):
                column, kind = int(layout.columns[at]), int(layout.kind[at])
                if name == "query":
                    row, other = source, column
                elif name == "diagonal":
                    row = list_of * (query_tiles + key_tiles - 1) + tile - column + key_tiles - 1
                    other = tile
                else:
                    lists = 1 if shared else layout.heads // flat
                    row = (batch * lists + (0 if shared else head // flat)) * key_tiles + column
                    other = (repeat if shared else head % flat) * query_tiles + tile
                inside = (tile + 1) * BLOCK <= NQ and (column + 1) * BLOCK <= NK
                found[row][0 if kind == FULL and inside else 1].append(other | (kind << 32))
    return found


def check(work: WorkList, wanted: dict[int, tuple[list[int], list[int]]], rows: int) -> None:
    pieces: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    for row, begin, middle, end, slot in work.items.tolist():
        if row >= 0:
            pieces[row].append((begin, middle, end, slot))
    assert sorted(pieces) == list(range(rows))
    cut = {row: (first, count) for row, first, count in work.splits.tolist() if row >= 0}
    slots: list[int] = []
    for row, items in pieces.items():
        items.sort()
        own = [slot for *_, slot in items]
        if row in cut:
            first, count = cut[row]
            assert own == list(range(first, first + count))
            assert count > 1
            slots += own
        else:
            assert own == [-1]
        full = [x for begin, middle, _, _ in items for x in work.entries[begin:middle].tolist()]
        other = [x for _, middle, end, _ in items for x in work.entries[middle:end].tolist()]
        assert (full, other) == wanted.get(row, ([], [])), row
    assert cut
    assert sorted(slots) == list(range(len(slots)))
    assert len(slots) <= work.slots


@pytest.mark.parametrize("longest", [None, 45], ids=["read", "unread"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_lists_are_those_made_tile_by_tile(
    batch: int, heads: int, longest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sa_lists, "SMALLEST_CUT", 4)
    monkeypatch.setattr(sa_lists, "MEANS_PER_ITEM_UNREAD", 2)
    layout = some_layout(batch, heads, longest)
    lists: TileLists = layout_lists(layout)
    assert lists.columns.numel() > 2 * sa_lists.TILES_PER_STEP
    assert lists.query_tiles > 2 * sa_lists.LISTS_PER_PROGRAM
    of_layout = batch * heads
    check(lists.by_query(), expected(layout, "query", 1), of_layout * lists.query_tiles)
    check(lists.by_diagonal(), expected(layout, "diagonal", 1), of_layout * (lists.query_tiles + lists.key_tiles - 1))
    for flat in (1, 2):
        groups = batch * (1 if heads == 1 else heads // flat)
        check(lists.by_key(flat, 2), expected(layout, "key", flat), groups * lists.key_tiles)
