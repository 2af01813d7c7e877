"""Rows between positions and a part's slots: gathered, merged by log-sum-exp, summed.

A result in positions is written once, by programs that own its rows and look up the slot of each in every part: no
running copy, no zeros first, no atomics, and one order of adding up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from sa_hf.ops.triton.common import head_base

MOST_PARTS = tl.constexpr(8)  # of one launch: each has two numbers among the arguments


@triton.jit
def load_at(base, rows, stride, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Any rows of a head as two chunks; 0 where not valid."""
    pointers = base + rows.to(tl.int64)[:, None] * stride
    x0 = tl.load(pointers + tl.arange(0, D0)[None, :], mask=valid[:, None], other=0.0)
    x1 = x0
    if D1 > 0:
        tail = D0 + tl.arange(0, D1)[None, :]
        x1 = tl.load(pointers + tail, mask=valid[:, None] & (tail < D), other=0.0)
    return x0, x1


@triton.jit
def store_at(base, rows, valid, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The adjoint of :func:`load_at`, into contiguous rows."""
    pointers = base + rows.to(tl.int64)[:, None] * D
    kind = base.dtype.element_ty
    tl.store(pointers + tl.arange(0, D0)[None, :], x0.to(kind), mask=valid[:, None])
    if D1 > 0:
        tail = D0 + tl.arange(0, D1)[None, :]
        tl.store(pointers + tail, x1.to(kind), mask=valid[:, None] & (tail < D))


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
    x0, x1 = load_at(head_base(x_ptr, batch, head, sb, sh), row, sn * 8, row >= 0, D, D0, D1)
    store_at(to_ptr, slot, inside, x0, x1, D, D0, D1)
