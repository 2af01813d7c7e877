"""Gradient of a distance table: deterministic sums along the diagonals of the score matrix.

The tiles of one tile diagonal share their element diagonals, so a work item adds them up before it skews the sum once.
What items add to one another is a 64-bit integer (fixed point): integer sums do not depend on their order.

Shapes as in ``backward``; a table is ``[H, 2 * N - 1]``, by key minus query position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_hf.ops.triton.backward import BACKWARD_RUNTIME, row_gradients
from sa_hf.ops.triton.common import (
    entry_fields,
    head_base,
    list_place,
    load_entry,
    load_item,
    load_optional,
    load_positions,
    load_range,
    load_spans,
    load_tile,
    settle_keys,
    stats_row,
    work_place,
)


@triton.jit
def add_diagonals(
    total, table_row, unit, row, diagonals, key_tiles, sub_q, sub_k, q_base, k_base, centre,
    TILE_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums along the diagonals of a square tile into the table."""
    # Column e of the skewed tile holds the elements (r, (r + e) mod BLOCK): distance e, or e - BLOCK once wrapped.
    local = tl.arange(0, BLOCK)
    turned = local[:, None] + local[None, :]
    skewed = tl.gather(total, turned % BLOCK, 1)
    ahead = tl.sum(tl.where(turned < BLOCK, skewed, 0.0), 0)
    behind = tl.sum(tl.where(turned < BLOCK, 0.0, skewed), 0)
    step = (key_tiles - 1 - row % diagonals) * TILE_K + (sub_k - sub_q) * BLOCK + k_base - q_base
    distance = step + local
    tl.atomic_add(table_row + distance, (ahead * unit).to(tl.int64), mask=tl.abs(distance) <= centre)
    distance = distance - BLOCK
    tl.atomic_add(table_row + distance, (behind * unit).to(tl.int64), mask=tl.abs(distance) <= centre)


@triton.jit(do_not_specialize=BACKWARD_RUNTIME)
def bias_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, shift_ptr, table_ptr, unit_ptr,
    items_ptr, entries_ptr, words_ptr, range_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr,
    row_words_ptr, column_words_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, pqb, pqh, pkb, pkh, seb, seh, srb, srh,
    n_q, n_k, heads, group, list_heads, rep_heads, reps, left, right, q_base, k_base, centre, extra,
    threshold, scale, softcap, inv_ramp, keep_scale, key_tiles, query_tiles,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SOFTCAP: tl.constexpr, RANGE_COLUMNS: tl.constexpr, RANGE_ON_FULL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``table_ptr``: int64 ``[heads, 2 * centre + 1]``, the gradient in units of ``1 / unit_ptr[0]``.

    ``ALIGNED``: slots are consecutive positions, and tiles square, so that tiles of a diagonal add up element by
    element; else each element is added on its own. Grid ``[items * (TILE_Q / BLOCK) * (TILE_K / BLOCK) * reps]``.
    """
    SUB_Q: tl.constexpr = TILE_Q // BLOCK
    SUB_K: tl.constexpr = TILE_K // BLOCK
    item, sub, rep = work_place(reps, SUB_Q * SUB_K)
    sub_q, sub_k = sub % SUB_Q, sub // SUB_Q
    row, begin, _middle, end, _slot = load_item(items_ptr, item)
    if row < 0:
        return
    diagonals = query_tiles + key_tiles - 1
    batch, head = list_place(row, rep, diagonals, list_heads, rep_heads)
    kv_head = head // group
    line = batch.to(tl.int64) * heads + head
    q_base_ptr = head_base(q_ptr, batch, head, sqb, sqh)
    g_base_ptr = head_base(grad_ptr, batch, head, sgb, sgh)
    k_base_ptr = head_base(k_ptr, batch, kv_head, skb, skh)
    v_base_ptr = head_base(v_ptr, batch, kv_head, svb, svh)
    table_row = table_ptr + head.to(tl.int64) * (2 * centre + 1) + centre
    unit = tl.load(unit_ptr)
    local = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for entry in range(begin, end):
        tile, kind = entry_fields(load_entry(entries_ptr, entry, entry + 1, 1))
        q_first = tile * TILE_Q + sub_q * BLOCK
        k_first = (tile - row % diagonals + key_tiles - 1) * TILE_K + sub_k * BLOCK
        q_slot, k_slot = q_first + local, k_first + local
        q0, q1 = load_tile(q_base_ptr, q_first, sqn * 8, n_q, BLOCK, D, D0, D1, True)
        g0, g1 = load_tile(g_base_ptr, q_first, sgn * 8, n_q, BLOCK, D, D0, D1, True)
        k0, k1 = load_tile(k_base_ptr, k_first, skn * 8, n_k, BLOCK, D, D0, D1, True)
        v0, v1 = load_tile(v_base_ptr, k_first, svn * 8, n_k, BLOCK, D, D0, D1, True)
        delta = tl.load(delta_ptr + stats_row(line, n_q) + q_slot)
        shift = tl.load(shift_ptr + stats_row(line, n_q) + q_slot)
        q_pos = load_positions(q_pos_ptr, batch, head, pqb, pqh, q_slot, None, q_base)
        k_pos = load_positions(k_pos_ptr, batch, head, pkb, pkh, k_slot, None, k_base)
        low, high, skip = load_range(range_ptr, batch, head, srb, srh, q_slot, n_q, RANGE_COLUMNS)
        span = load_spans(spans_ptr, batch, head, seb, seh, k_slot, None)
        row_word = load_optional(row_words_ptr, stats_row(line, n_q), q_slot, None)
        word = load_optional(column_words_ptr, stats_row(line, n_k), k_slot, None)
        ds, _ = row_gradients(
            q0, q1, k0, k1, g0, g1, v0, v1, shift, delta, q_slot, k_slot, sub_q * BLOCK, sub_k * BLOCK, q_pos, k_pos,
            kind, words_ptr, low, high, skip, span, bias_ptr, head, row_word, word, n_k, left, right, centre, extra,
            threshold, scale, softcap, inv_ramp, keep_scale, TILE_Q, TILE_K, BLOCK, BLOCK, D1, SOFTCAP, True,
            range_ptr is not None, RANGE_ON_FULL, k_pos_ptr is not None, row_words_ptr is not None,
            spans_ptr is not None,
        )  # fmt: skip
        ds = tl.where((q_pos >= extra)[:, None] & (k_pos >= extra)[None, :], ds, 0.0)
        if ALIGNED:
            total += ds
        else:
            distance = k_pos[None, :] - q_pos[:, None]
            fixed = (ds * unit).to(tl.int64)
            tl.atomic_add(table_row + distance, fixed, mask=(fixed != 0) & (tl.abs(distance) <= centre))
    if ALIGNED:
        add_diagonals(
            total, table_row, unit, row, diagonals, key_tiles, sub_q, sub_k, q_base, k_base, centre, TILE_K, BLOCK
        )


settle_keys(globals())
