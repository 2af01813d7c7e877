"""Decoding kernels: new queries against listed positions of the cache, split over the list, GQA-packed.

Bound by memory: a program gathers each listed K and V row once for all the query heads that share the list.

Shapes: ``q_ptr, out_ptr [B, H, Nq, D]``, ``k_ptr, v_ptr [B, Hkv, Nk, D]``, ``index_ptr [B | 1, 1 | Hkv | H, Nq, m]``. A
step has the query heads that share a list and K of its keys: scores ``[heads, K]``, sums ``[heads, D0]`` and ``[heads,
D1]`` (head_dim as two chunks).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_hf.ops.triton.common import (
    LN2,
    LOG2E,
    add_product,
    bend_scores,
    dot_rows,
    empty_sums,
    gather_rows,
    head_base,
    settle_keys,
    span_gate,
    store_rows,
)

DECODE_RUNTIME = (
    "sqb", "sqh", "sqn", "skb", "skh", "skn", "svb", "svh", "svn", "sob", "soh", "son", "sib", "sih", "seb", "seh",
    "n_q", "n_k", "heads", "group", "packed", "most", "chunk", "splits", "centre", "extra", "scale", "softcap",
    "inv_ramp",
)  # fmt: skip


@triton.jit
def decode_step(
    q0, q1, peak, total, acc0, acc1, k_base, v_base, places, bias_ptr, spans_row, bias_head, here, first, q_pos,
    skn, svn, most, centre, extra, scale, softcap, inv_ramp,
    BLOCK_K: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """``BLOCK_K`` places of a list, from ``first`` on, into the running softmax; ``spans_row`` points at the spans of
    the heads, ``[heads, 1]``."""
    place = first + tl.arange(0, BLOCK_K)
    k_pos = tl.load(places + place, mask=place < most, other=-1).to(tl.int32)
    valid = k_pos >= 0
    k0, k1 = gather_rows(k_base, k_pos, skn * 8, valid, D, D0, D1)
    s = dot_rows(q0, q1, k0, k1, D1)
    s, _ = bend_scores(s, q_pos, k_pos[None, :], bias_ptr, bias_head, centre, extra, scale, softcap, SOFTCAP)
    keep = valid[None, :]
    gate = 1.0
    if spans_row is not None:
        span = tl.load(spans_row + k_pos[None, :], mask=here[:, None] & valid[None, :], other=0.0)
        gate, _ = span_gate(q_pos, k_pos[None, :], span, inv_ramp)
        keep = keep & (gate > 0)
    s = tl.where(keep, s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s - shift[:, None]) * gate
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(p, 1)
    acc0 = acc0 * decay[:, None]
    if D1 > 0:
        acc1 = acc1 * decay[:, None]
    v0, v1 = gather_rows(v_base, k_pos, svn * 8, valid, D, D0, D1)
    acc0, acc1 = add_product(p, v0, v1, acc0, acc1, D1)
    return new_peak, total, acc0, acc1


@triton.jit(do_not_specialize=DECODE_RUNTIME)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, part_lse_ptr, index_ptr, bias_ptr, spans_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sib, sih, seb, seh,
    n_q, n_k, heads, group, packed, most, chunk, splits, centre, extra, scale, softcap, inv_ramp,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """``packed`` query heads (a group, or 1) share a list of ``most`` places; a split covers ``chunk`` of them.

    ``index_ptr`` ``[B | 1, lists, n_q, most]`` with strides ``sib`` and ``sih`` of the batch and of a pack of heads.
    Grid ``[splits, heads / packed * n_q, batch]``.
    """
    split = tl.program_id(0)
    query = tl.program_id(1) % n_q
    pack = tl.program_id(1) // n_q
    batch = tl.program_id(2)
    member = tl.arange(0, ROWS)
    head = pack * packed + member
    here = member < packed
    kv_head = pack * packed // group
    q_row = q_ptr + (batch.to(tl.int64) * sqb + query.to(tl.int64) * sqn) * 8 + head.to(tl.int64)[:, None] * (sqh * 8)
    q0 = tl.load(q_row + tl.arange(0, D0)[None, :], mask=here[:, None], other=0.0)
    q1 = q0
    if D1 > 0:
        tail = D0 + tl.arange(0, D1)[None, :]
        q1 = tl.load(q_row + tail, mask=here[:, None] & (tail < D), other=0.0)
    k_base, v_base = head_base(k_ptr, batch, kv_head, skb, skh), head_base(v_ptr, batch, kv_head, svb, svh)
    places = index_ptr + batch.to(tl.int64) * sib + pack.to(tl.int64) * sih + query.to(tl.int64) * most
    q_pos = n_k - n_q + query
    bias_head = tl.where(here, head, 0)[:, None]
    peak, total, acc0, acc1 = empty_sums(ROWS, D0, D1)
    spans_row = spans_ptr
    if spans_ptr is not None:
        spans_row = spans_ptr + batch.to(tl.int64) * seb + head.to(tl.int64)[:, None] * seh
    for first in range(split * chunk, tl.minimum(split * chunk + chunk, most), BLOCK_K):
        peak, total, acc0, acc1 = decode_step(
            q0, q1, peak, total, acc0, acc1, k_base, v_base, places, bias_ptr, spans_row, bias_head, here, first, q_pos,
            skn, svn, most, centre, extra, scale, softcap, inv_ramp, BLOCK_K, D, D0, D1, SOFTCAP,
        )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    acc0 = acc0 / safe[:, None]
    acc1 = acc1 / safe[:, None]
    if splits == 1:
        out_row = out_ptr + (batch.to(tl.int64) * sob + query.to(tl.int64) * son) * 8
        out_row += head.to(tl.int64)[:, None] * (soh * 8)
        store_rows(out_row, acc0, acc1, here, D, D0, D1)
    else:
        line = ((batch.to(tl.int64) * heads + head) * n_q + query) * splits + split
        store_rows(part_ptr + line[:, None] * D, acc0, acc1, here, D, D0, D1)
        lse = tl.where(total > 0, (peak + tl.log2(safe)) * LN2, float("-inf"))
        tl.store(part_lse_ptr + line, lse, mask=here)


MERGE_RUNTIME = ("sob", "soh", "son", "n_q", "heads", "splits")


@triton.jit(do_not_specialize=MERGE_RUNTIME)
def merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, sob, soh, son, n_q, heads, splits,
    SPLITS_AT_ONCE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge the splits of each query by log-sum-exp, in a fixed order. Grid ``[batch * heads * n_q]``."""
    line = tl.program_id(0)
    query = line % n_q
    batch, head = line // n_q // heads, line // n_q % heads
    column = tl.arange(0, WIDTH)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        split = first + tl.arange(0, SPLITS_AT_ONCE)
        at = line.to(tl.int64) * splits + split
        lse = tl.load(part_lse_ptr + at, mask=split < splits, other=float("-inf")) * LOG2E
        x = tl.load(
            part_ptr + at[:, None] * D + column[None, :],
            mask=(split < splits)[:, None] & (column < D)[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight, decay = tl.exp2(lse - shift), tl.exp2(peak - shift)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay + tl.sum(x * weight[:, None], 0)
        peak = new_peak
    out = out_ptr + (batch.to(tl.int64) * sob + head.to(tl.int64) * soh + query.to(tl.int64) * son) * 8
    value = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + column, value.to(out_ptr.dtype.element_ty), mask=column < D)


settle_keys(globals())
