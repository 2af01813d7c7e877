"""One kernel from a layout's tiles to a work list: sorted by list, full tiles first, cut into items (``lists``).

Each program makes ROWS neighbouring lists on its own. Where they begin follows from the layout's ``row_start`` and a
count, so no program waits for another; only the room for the pieces of cut lists comes from a counter. Which pieces
get which room may differ from run to run, what they add up to and in which order does not.

Shapes: of a layout ``row_start_ptr [lists + 1]``, and of each tile its list, column and kind, ``row_ptr, column_ptr,
kind_ptr [tiles]``; ``entries_ptr [tiles * repeats]``. A program has R = ROWS lists and reads T = TILES tiles at a step:
``owners, counts, full_counts, start [R]``; ``owner, word, full, earlier [T]``; ``mine, place [T, R]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_hf.ops.triton.common import settle_keys

BY_QUERY, BY_KEY, BY_DIAGONAL = 0, 1, 2
MODES = {"BY_QUERY": BY_QUERY, "BY_KEY": BY_KEY, "BY_DIAGONAL": BY_DIAGONAL}
_QUERY, _KEY = tl.constexpr(BY_QUERY), tl.constexpr(BY_KEY)
FULL_TILE = tl.constexpr(-1)
LIST_RUNTIME = (
    "sources", "repeats", "chunks", "rows", "query_tiles", "key_tiles", "query_slots", "key_slots", "tile_q", "tile_k",
    "cut", "room",
)  # fmt: skip


@triton.jit
def load_tiles(
    row_ptr, column_ptr, kind_ptr, at, end, first_source, query_tiles, key_tiles, query_slots, key_slots,
    tile_q, tile_k, MODE: tl.constexpr,
):  # fmt: skip
    """Of tiles ``at``: the list each belongs to (-1 past the end), its entry without repetition, whether it is full
    (no predicate: also not the end of the slots)."""
    valid = at < end
    source = tl.load(row_ptr + at, mask=valid, other=0).to(tl.int32) - first_source
    column = tl.load(column_ptr + at, mask=valid, other=0)
    kind = tl.load(kind_ptr + at, mask=valid, other=0)
    tile = source % query_tiles
    inside = ((tile + 1) * tile_q <= query_slots) & ((column + 1) * tile_k <= key_slots)
    full = (kind == FULL_TILE) & inside
    if MODE == _QUERY:
        owner, other = source, column
    elif MODE == _KEY:
        owner, other = column, source
    else:
        owner, other = tile - column + key_tiles - 1, tile
    word = other.to(tl.int64) | (kind.to(tl.int64) << 32)
    return tl.where(valid, owner, -1), word, full


@triton.jit(do_not_specialize=LIST_RUNTIME)
def list_kernel(
    row_start_ptr, row_ptr, column_ptr, kind_ptr, entries_ptr, items_ptr, splits_ptr, counters_ptr,
    sources, repeats, chunks, rows, query_tiles, key_tiles, query_slots, key_slots, tile_q, tile_k, cut, room,
    MODE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid ``[groups * chunks]``. A group is ``sources`` of the layout's lists that become ``rows`` of ours, each tile
    entered ``repeats`` times (once per query head that shares it).

    ``items_ptr`` int32 ``[room + groups * rows, 5]``, ``splits_ptr`` int32 ``[splits, 3]`` and ``counters_ptr`` int32
    ``[2]`` come filled with -1: the pieces of cut lists fill the items from ``room`` downwards, whole lists have their
    own behind.
    """
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first_source = group * sources * query_tiles
    owners = chunk * ROWS + tl.arange(0, ROWS)
    begin_row, end_row = first_source, first_source + sources * query_tiles
    if MODE == _QUERY:
        begin_row = first_source + chunk * ROWS
        end_row = tl.minimum(begin_row + ROWS, end_row)
    begin = tl.load(row_start_ptr + begin_row).to(tl.int32)
    end = tl.load(row_start_ptr + end_row).to(tl.int32)
    step = tl.arange(0, TILES)

    counts = tl.zeros([ROWS], tl.int32)
    full_counts = tl.zeros([ROWS], tl.int32)
    earlier = tl.zeros([TILES], tl.int32)
    for at in range(begin, end, TILES):
        owner, _, full = load_tiles(
            row_ptr, column_ptr, kind_ptr, at + step, end, first_source, query_tiles, key_tiles, query_slots,
            key_slots, tile_q, tile_k, MODE,
        )  # fmt: skip
        mine = owner[:, None] == owners[None, :]
        counts += tl.sum(mine.to(tl.int32), 0)
        full_counts += tl.sum((mine & full[:, None]).to(tl.int32), 0)
        earlier += ((owner >= 0) & (owner < chunk * ROWS)).to(tl.int32)
    counts *= repeats
    full_counts *= repeats
    start = (begin + tl.sum(earlier, 0)) * repeats + tl.cumsum(counts, 0) - counts

    next_full, next_other = start, start + full_counts
    for repeat in range(repeats):
        for at in range(begin, end, TILES):
            owner, word, full = load_tiles(
                row_ptr, column_ptr, kind_ptr, at + step, end, first_source, query_tiles, key_tiles, query_slots,
                key_slots, tile_q, tile_k, MODE,
            )  # fmt: skip
            mine = owner[:, None] == owners[None, :]
            as_full = (mine & full[:, None]).to(tl.int32)
            as_other = mine.to(tl.int32) - as_full
            place = as_full * (next_full[None, :] + tl.cumsum(as_full, 0) - 1)
            place += as_other * (next_other[None, :] + tl.cumsum(as_other, 0) - 1)
            entry = word + repeat * query_tiles
            tl.store(entries_ptr + tl.sum(place, 1), entry, mask=tl.sum(mine.to(tl.int32), 1) > 0)
            next_full += tl.sum(as_full, 0)
            next_other += tl.sum(as_other, 0)

    store_items(
        items_ptr, splits_ptr, counters_ptr, group * rows + owners, owners < rows, start, full_counts, counts, cut, room
    )


@triton.jit
def store_items(items_ptr, splits_ptr, counters_ptr, row, real, start, full_counts, counts, cut, room):
    """The items of ROWS lists: one each, or pieces of at most ``cut`` tiles, and the lists of pieces."""
    middle, end = start + full_counts, start + counts
    pieces = tl.where(real, (counts + cut - 1) // cut, 0)
    is_cut = pieces > 1
    item = items_ptr + (room + row) * 5
    tl.store(item, tl.where(is_cut, -1, row), mask=real)
    tl.store(item + 1, start, mask=real)
    tl.store(item + 2, middle, mask=real)
    tl.store(item + 3, end, mask=real)
    tl.store(item + 4, tl.full(row.shape, -1, tl.int32), mask=real)

    pieces = tl.where(is_cut, pieces, 0)
    wanted = tl.sum(pieces, 0)
    if wanted > 0:
        # The counters start at -1.
        first_slot = tl.atomic_add(counters_ptr, wanted) + 1 + tl.cumsum(pieces, 0) - pieces
        split = tl.atomic_add(counters_ptr + 1, tl.sum(is_cut.to(tl.int32), 0)) + tl.cumsum(is_cut.to(tl.int32), 0)
        tl.store(splits_ptr + split * 3, row, mask=is_cut)
        tl.store(splits_ptr + split * 3 + 1, first_slot, mask=is_cut)
        tl.store(splits_ptr + split * 3 + 2, pieces, mask=is_cut)
        size = (counts + pieces - 1) // tl.maximum(pieces, 1)
        for piece in range(tl.max(pieces, 0)):
            written = piece < pieces
            begin = tl.minimum(start + piece * size, end)
            stop = tl.minimum(begin + size, end)
            slot = first_slot + piece
            item = items_ptr + (room - 1 - slot) * 5
            tl.store(item, row, mask=written)
            tl.store(item + 1, begin, mask=written)
            tl.store(item + 2, tl.minimum(tl.maximum(middle, begin), stop), mask=written)
            tl.store(item + 3, stop, mask=written)
            tl.store(item + 4, slot, mask=written)


settle_keys(globals())
