"""Rows between positions and a part's slots: gathered, merged by log-sum-exp, summed.

A result in positions is written once, by programs that own its rows and look up the slot of each in every part: no
running copy, no zeros first, no atomics, and one order of adding up.

Shapes: rows in positions ``[B, H | Hkv, N, D]``, in slots ``[B, H, slots, D]``; log-sum-exp ``[B * H, N | slots]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_hf.ops.triton.common import gather_rows, head_base, in_run, settle_keys, store_rows


@triton.jit
def store_at(base, rows, valid, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Chunks to any contiguous rows of a head."""
    store_rows(base + rows.to(tl.int64)[:, None] * D, x0, x1, valid, D, D0, D1)


GATHER_RUNTIME = (
    "sqb", "sqh", "sqn", "sob", "soh", "son", "sgb", "sgh", "sgn", "skb", "skh", "skn", "svb", "svh", "svn",
    "pqb", "pqh", "pkb", "pkh", "n_q", "n_k", "length", "heads", "key_heads", "group", "query_tiles",
)  # fmt: skip


@triton.jit(do_not_specialize=GATHER_RUNTIME)
def gather_kernel(
    q_ptr, out_ptr, grad_ptr, lse_ptr, k_ptr, v_ptr, to_q_ptr, to_out_ptr, to_grad_ptr, to_lse_ptr, to_k_ptr, to_v_ptr,
    q_index_ptr, k_index_ptr,
    sqb, sqh, sqn, sob, soh, son, sgb, sgh, sgn, skb, skh, skn, svb, svh, svn, pqb, pqh, pkb, pkh,
    n_q, n_k, length, heads, key_heads, group, query_tiles,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """The slots of one part: queries (with output, its gradient and log-sum-exp), then keys and values; what is None is
    left out, empty slots are 0.

    Grid ``[query_tiles + key tiles, max(heads, key_heads), batch]``; the slots have ``key_heads`` heads of keys, each
    ``group`` of them from one.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tile < query_tiles:
        if q_index_ptr is not None:
            slot = tile * ROWS + tl.arange(0, ROWS)
            inside = slot < tl.where(head < heads, n_q, 0)
            row = tl.load(q_index_ptr + batch.to(tl.int64) * pqb + head.to(tl.int64) * pqh + slot, inside, other=-1)
            lane = batch.to(tl.int64) * heads + head
            to = lane * n_q * D
            move_rows(q_ptr, to_q_ptr + to, batch, head, row, slot, inside, sqb, sqh, sqn, D, D0, D1)
            if grad_ptr is not None:
                move_rows(out_ptr, to_out_ptr + to, batch, head, row, slot, inside, sob, soh, son, D, D0, D1)
                move_rows(grad_ptr, to_grad_ptr + to, batch, head, row, slot, inside, sgb, sgh, sgn, D, D0, D1)
                lse = tl.load(lse_ptr + lane * length + row, mask=row >= 0, other=0.0)
                tl.store(to_lse_ptr + lane * n_q + slot, lse, mask=inside)
    else:
        if k_index_ptr is not None:
            slot = (tile - query_tiles) * ROWS + tl.arange(0, ROWS)
            inside = slot < tl.where(head < key_heads, n_k, 0)
            row = tl.load(k_index_ptr + batch.to(tl.int64) * pkb + head.to(tl.int64) * pkh + slot, inside, other=-1)
            to = (batch.to(tl.int64) * key_heads + head) * n_k * D
            source = head // group
            move_rows(k_ptr, to_k_ptr + to, batch, source, row, slot, inside, skb, skh, skn, D, D0, D1)
            move_rows(v_ptr, to_v_ptr + to, batch, source, row, slot, inside, svb, svh, svn, D, D0, D1)


@triton.jit
def move_rows(
    x_ptr, to_ptr, batch, head, row, slot, inside, sb, sh, sn, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):  # fmt: skip
    x0, x1 = gather_rows(head_base(x_ptr, batch, head, sb, sh), row, sn * 8, row >= 0, D, D0, D1)
    store_at(to_ptr, slot, inside, x0, x1, D, D0, D1)


# Of each part of a launch: its slots, and the first position of a run, or ``-1 - kind`` of an inverse index (bit 0: a
# head has its own, bit 1: a sequence). One by one, because Triton specialises the numbers inside a tuple.
SIZES = ("n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7", "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7")
MOST_PARTS = len(SIZES) // 2


@triton.jit
def slots_of(inverse_ptr, start, position, batch, head, heads, length):
    """The slot of each position in a part with ``heads`` heads; where it has none, as from ``length`` on, a negative
    one or one too large."""
    slot = position - start
    if inverse_ptr is not None:
        kind = -1 - start
        by_head, by_sequence = kind & 1, kind >> 1
        lane = by_sequence * batch.to(tl.int64) * tl.where(by_head > 0, heads, 1) + by_head * head
        limit = tl.where(start < 0, length, 0)
        listed = tl.load(inverse_ptr + lane * length + position, mask=position < limit, other=-1)
        slot = tl.where(start < 0, listed, slot)
    return slot


@triton.jit(do_not_specialize=(*SIZES, "length", "heads"))
def merge_parts_kernel(
    parts, lses, inverses, out_ptr, lse_ptr,
    n0, n1, n2, n3, n4, n5, n6, n7, s0, s1, s2, s3, s4, s5, s6, s7, length, heads,
    PARTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Parts by log-sum-exp: ``parts [B, H, slots, D]``, ``lses [B, H, slots]`` to ``[B, H, length(, D)]``; positions in
    no slot get 0 and -inf.

    Grid ``[ceil(length / ROWS), heads, batch]``.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = batch.to(tl.int64) * heads + head
    sizes, starts = (n0, n1, n2, n3, n4, n5, n6, n7), (s0, s1, s2, s3, s4, s5, s6, s7)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, D0], tl.float32)
    acc1 = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    for i in tl.static_range(PARTS):
        slots = sizes[i]
        slot = slots_of(None if inverses is None else inverses[i], starts[i], position, batch, head, heads, length)
        there = in_run(slot, 0, slots)
        lse = tl.load(lses[i] + lane * slots + slot, mask=there, other=float("-inf"))
        x0, x1 = gather_rows(parts[i] + lane * slots * D, slot, D, there, D, D0, D1)
        new_peak = tl.maximum(peak, lse)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay, weight = tl.exp(peak - shift), tl.exp(lse - shift)
        total = total * decay + weight
        acc0 = acc0 * decay[:, None] + x0.to(tl.float32) * weight[:, None]
        if D1 > 0:
            acc1 = acc1 * decay[:, None] + x1.to(tl.float32) * weight[:, None]
        peak = new_peak
    safe = tl.where(total > 0, total, 1.0)
    tl.store(lse_ptr + lane * length + position, peak + tl.log(safe), mask=position < length)
    store_at(
        out_ptr + lane * length * D, position, position < length, acc0 / safe[:, None], acc1 / safe[:, None], D, D0, D1
    )  # fmt: skip


@triton.jit(do_not_specialize=(*SIZES, "length", "heads", "group"))
def sum_parts_kernel(
    parts, inverses, out_ptr,
    n0, n1, n2, n3, n4, n5, n6, n7, s0, s1, s2, s3, s4, s5, s6, s7, length, heads, group,
    PARTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Sums of parts ``[B, H_p, slots, D]`` in ``[B, H, length, D]``, part by part: ``H_p`` is ``heads * group`` where
    each head of an index has its own list, and those of a group are added in their order; else ``heads``.

    Grid ``[ceil(length / ROWS), heads, batch]``.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sizes, starts = (n0, n1, n2, n3, n4, n5, n6, n7), (s0, s1, s2, s3, s4, s5, s6, s7)
    acc0 = tl.zeros([ROWS, D0], tl.float32)
    acc1 = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    for i in tl.static_range(PARTS):
        slots, start = sizes[i], starts[i]
        members = tl.where(start < 0, tl.where(((-1 - start) & 1) > 0, group, 1), 1)
        for member in range(0, members):
            own = head * members + member
            lane = batch.to(tl.int64) * (heads * members) + own
            slot = slots_of(
                None if inverses is None else inverses[i], start, position, batch, own, heads * members, length
            )  # fmt: skip
            x0, x1 = gather_rows(parts[i] + lane * slots * D, slot, D, in_run(slot, 0, slots), D, D0, D1)
            acc0 += x0.to(tl.float32)
            if D1 > 0:
                acc1 += x1.to(tl.float32)
    lane = batch.to(tl.int64) * heads + head
    store_at(out_ptr + lane * length * D, position, position < length, acc0, acc1, D, D0, D1)


@triton.jit(do_not_specialize=("slots", "length"))
def invert_kernel(index_ptr, inverse_ptr, slots, length, ROWS: tl.constexpr):
    """The slot of each position, int32, where it was -1. Grid ``[ceil(slots / ROWS), index heads, index batch]``."""
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    position = tl.load(index_ptr + lane * slots + slot, mask=slot < slots, other=-1)
    tl.store(inverse_ptr + lane * length + position, slot, mask=position >= 0)


settle_keys(globals())
