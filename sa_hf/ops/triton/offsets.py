"""Attention over fixed offsets: each offset reads K and V rows shifted by it, contiguous loads and no gather.

Bound by memory, so the products are plain sums of fp32 products, without matrix units.

Shapes as in ``forward``: a program has M rows, ``[M, D0]`` and ``[M, D1]`` of queries, keys and sums, and the scores of
one offset at a time, ``[M]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_hf.ops.triton.backward import score_gradient, tile_probabilities
from sa_hf.ops.triton.common import (
    LN2,
    bend_scores,
    dropout_kept,
    empty_sums,
    head_base,
    load_optional,
    load_positions,
    load_rows,
    load_spans,
    settle_keys,
    span_gate,
    stats_row,
    store_tile,
)

_SHARED = (
    "pqb", "pqh", "pkb", "pkh", "seb", "seh", "n", "heads", "group", "most", "list_stride", "begin", "stop", "q_base",
    "k_base", "centre", "extra", "threshold", "scale", "softcap", "inv_ramp", "keep_scale",
)  # fmt: skip
FORWARD_RUNTIME = (*[f"s{x}{axis}" for x in "qkvo" for axis in "bhn"], *_SHARED)
OFFSETS_BACKWARD_RUNTIME = (*[f"s{x}{axis}" for x in "qkvgo" for axis in "bhn"], *_SHARED)


@triton.jit
def row_products(a0, a1, b0, b1, D1: tl.constexpr):
    """``sum(a * b)`` of each row of two chunked tiles, fp32."""
    s = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if D1 > 0:
        s += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return s


@triton.jit(do_not_specialize=FORWARD_RUNTIME)
def offsets_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, offsets_ptr, counts_ptr,
    q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, pqb, pqh, pkb, pkh, seb, seh,
    n, heads, group, most, list_stride, begin, stop, q_base, k_base, centre, extra, threshold,
    scale, softcap, inv_ramp, keep_scale,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """``offsets_ptr`` int32 ``[lists, most]``, ``counts_ptr`` int32 ``[lists]``; ``list_stride`` is 0 where heads share
    one list, else 1. Grid ``[ceil(n / ROWS), heads, batch]``."""
    first, head, batch = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    row = first + tl.arange(0, ROWS)
    inside = (row >= begin) & (row < stop)
    q_base_ptr = head_base(q_ptr, batch, head, sqb, sqh)
    k_base_ptr = head_base(k_ptr, batch, head // group, skb, skh)
    v_base_ptr = head_base(v_ptr, batch, head // group, svb, svh)
    q0, q1 = load_rows(q_base_ptr, first, sqn * 8, row < n, ROWS, D, D0, D1)
    q_pos = load_positions(q_pos_ptr, batch, head, pqb, pqh, row, n, q_base)
    line = batch.to(tl.int64) * heads + head
    at, stats = line * n, stats_row(line, n)
    row_word = load_optional(row_words_ptr, stats, row, row < n)
    peak, total, acc0, acc1 = empty_sums(ROWS, D0, D1)
    for t in range(0, tl.load(counts_ptr + head * list_stride)):
        offset = tl.load(offsets_ptr + head * list_stride * most + t)
        key = row - offset
        keep = inside & (key >= begin) & (key < stop)
        k_pos = load_positions(k_pos_ptr, batch, head, pkb, pkh, key, n, k_base)
        if k_pos_ptr is not None:
            keep = keep & (k_pos >= 0)
        k0, k1 = load_rows(k_base_ptr, first - offset, skn * 8, keep, ROWS, D, D0, D1)
        s = row_products(q0, q1, k0, k1, D1)
        s, _ = bend_scores(s, q_pos, k_pos, bias_ptr, head, centre, extra, scale, softcap, SOFTCAP)
        gate = 1.0
        if spans_ptr is not None:
            span = load_spans(spans_ptr, batch, head, seb, seh, key, keep)
            gate, _ = span_gate(q_pos, k_pos, span, inv_ramp)
            keep = keep & (gate > 0)
        s = tl.where(keep, s, float("-inf"))
        new_peak = tl.maximum(peak, s)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s - shift) * gate
        decay = tl.exp2(peak - shift)
        total = total * decay + p
        if row_words_ptr is not None:
            word = load_optional(column_words_ptr, stats, key, keep)
            p = tl.where(dropout_kept(row_word, word, threshold), p, 0.0)
        v0, v1 = load_rows(v_base_ptr, first - offset, svn * 8, keep, ROWS, D, D0, D1)
        acc0 = acc0 * decay[:, None] + p[:, None] * v0.to(tl.float32)
        if D1 > 0:
            acc1 = acc1 * decay[:, None] + p[:, None] * v1.to(tl.float32)
        peak = new_peak
    kept = total > 0
    if q_pos_ptr is not None:
        kept = kept & (q_pos >= 0)
    safe = tl.where(kept, total, 1.0)
    inverse = tl.where(kept, 1.0 / safe, 0.0)
    if row_words_ptr is not None:
        inverse = inverse * keep_scale
    out_base = head_base(out_ptr, batch, head, sob, soh)
    store_tile(out_base, first, son * 8, n, acc0 * inverse[:, None], acc1 * inverse[:, None], ROWS, D, D0, D1)
    lse = tl.where(kept, (peak + tl.log2(safe)) * LN2, float("-inf"))
    tl.store(lse_ptr + at + row, lse, mask=row < n)


@triton.jit
def pair_gradient(
    q0, q1, k0, k1, v0, v1, g0, g1, shift, delta, q_pos, k_pos, key, begin, stop, span, bias_ptr, head,
    row_word, word, centre, extra, threshold, scale, softcap, inv_ramp, keep_scale,
    D1: tl.constexpr, SOFTCAP: tl.constexpr, HAS_KEYS: tl.constexpr, DROPOUT: tl.constexpr, HAS_SPANS: tl.constexpr,
):  # fmt: skip
    """One key per row: ``(p after dropout, d loss / d bent score, d loss / d scaled product, d loss / d span)``."""
    s = row_products(q0, q1, k0, k1, D1)
    dp = row_products(g0, g1, v0, v1, D1)
    p, p_out, factor, bend, slope = tile_probabilities(
        s, shift, key, key, key, key, q_pos, k_pos, 0, None, begin, stop, begin, span, bias_ptr, head, row_word, word,
        0, 0, 0, centre, extra, threshold, scale, softcap, inv_ramp, keep_scale, 1, 1, SOFTCAP, False, True, True,
        HAS_KEYS, DROPOUT, HAS_SPANS,
    )  # fmt: skip
    bent, raw, excess = score_gradient(dp, p, factor, bend, delta, SOFTCAP, DROPOUT)
    return p_out, bent, raw, slope * excess


@triton.jit(do_not_specialize=OFFSETS_BACKWARD_RUNTIME)
def offsets_query_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, shift_ptr, dq_ptr, table_ptr, unit_ptr, offsets_ptr, counts_ptr,
    q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sob, soh, son, pqb, pqh, pkb, pkh, seb, seh,
    n, heads, group, most, list_stride, begin, stop, q_base, k_base, centre, extra, threshold,
    scale, softcap, inv_ramp, keep_scale,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dQ; the distance table's gradient as in ``bias_kernel`` (``table_ptr``, ``unit_ptr``). Grid as in the forward."""
    first, head, batch = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    row = first + tl.arange(0, ROWS)
    inside = (row >= begin) & (row < stop)
    k_base_ptr = head_base(k_ptr, batch, head // group, skb, skh)
    v_base_ptr = head_base(v_ptr, batch, head // group, svb, svh)
    q_base_ptr = head_base(q_ptr, batch, head, sqb, sqh)
    g_base_ptr = head_base(grad_ptr, batch, head, sgb, sgh)
    q0, q1 = load_rows(q_base_ptr, first, sqn * 8, row < n, ROWS, D, D0, D1)
    g0, g1 = load_rows(g_base_ptr, first, sgn * 8, row < n, ROWS, D, D0, D1)
    q_pos = load_positions(q_pos_ptr, batch, head, pqb, pqh, row, n, q_base)
    stats = stats_row(batch.to(tl.int64) * heads + head, n)
    delta = tl.load(delta_ptr + stats + row, mask=row < n, other=0.0)
    shift = tl.load(shift_ptr + stats + row, mask=inside & (row < n), other=float("inf"))
    row_word = load_optional(row_words_ptr, stats, row, row < n)
    acc0 = tl.zeros([ROWS, D0], tl.float32)
    acc1 = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    for t in range(0, tl.load(counts_ptr + head * list_stride)):
        offset = tl.load(offsets_ptr + head * list_stride * most + t)
        key = row - offset
        keep = inside & (key >= begin) & (key < stop)
        k_pos = load_positions(k_pos_ptr, batch, head, pkb, pkh, key, n, k_base)
        k0, k1 = load_rows(k_base_ptr, first - offset, skn * 8, keep, ROWS, D, D0, D1)
        v0, v1 = load_rows(v_base_ptr, first - offset, svn * 8, keep, ROWS, D, D0, D1)
        span = load_spans(spans_ptr, batch, head, seb, seh, key, keep)
        word = load_optional(column_words_ptr, stats, key, keep)
        _, bent, ds, _ = pair_gradient(
            q0, q1, k0, k1, v0, v1, g0, g1, shift, delta, q_pos, k_pos, key, begin, stop, span, bias_ptr, head,
            row_word, word, centre, extra, threshold, scale, softcap, inv_ramp, keep_scale,
            D1, SOFTCAP, k_pos_ptr is not None, row_words_ptr is not None, spans_ptr is not None,
        )  # fmt: skip
        acc0 += ds[:, None] * k0.to(tl.float32)
        if D1 > 0:
            acc1 += ds[:, None] * k1.to(tl.float32)
        if table_ptr is not None:
            unit = tl.load(unit_ptr)
            table_row = table_ptr + head.to(tl.int64) * (2 * centre + 1) + centre
            bent = tl.where((q_pos >= extra) & (k_pos >= extra), bent, 0.0)
            if (q_pos_ptr is None) and (k_pos_ptr is None):
                distance = k_base - q_base - offset
                fixed = (tl.sum(bent, 0) * unit).to(tl.int64)
                tl.atomic_add(table_row + distance, fixed, mask=tl.abs(distance) <= centre)
            else:
                distance = k_pos - q_pos
                fixed = (bent * unit).to(tl.int64)
                tl.atomic_add(table_row + distance, fixed, mask=(fixed != 0) & (tl.abs(distance) <= centre))
    dq_base = head_base(dq_ptr, batch, head, sob, soh)
    store_tile(dq_base, first, son * 8, n, acc0 * scale, acc1 * scale, ROWS, D, D0, D1)


@triton.jit(do_not_specialize=OFFSETS_BACKWARD_RUNTIME)
def offsets_key_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, shift_ptr, dk_ptr, dv_ptr, d_span_ptr, offsets_ptr, counts_ptr,
    q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sob, soh, son, pqb, pqh, pkb, pkh, seb, seh,
    n, heads, group, most, list_stride, begin, stop, q_base, k_base, centre, extra, threshold,
    scale, softcap, inv_ramp, keep_scale,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dK, dV over the query heads of a group, and the spans' gradient by query head, fp32 ``[batch, heads, n]``.

    Grid ``[ceil(n / ROWS), heads / group, batch]``.
    """
    first, kv_head, batch = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    key = first + tl.arange(0, ROWS)
    inside = (key >= begin) & (key < stop)
    k_base_ptr = head_base(k_ptr, batch, kv_head, skb, skh)
    v_base_ptr = head_base(v_ptr, batch, kv_head, svb, svh)
    k0, k1 = load_rows(k_base_ptr, first, skn * 8, key < n, ROWS, D, D0, D1)
    v0, v1 = load_rows(v_base_ptr, first, svn * 8, key < n, ROWS, D, D0, D1)
    dk0 = tl.zeros([ROWS, D0], tl.float32)
    dv0 = tl.zeros([ROWS, D0], tl.float32)
    dk1 = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    dv1 = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        line = batch.to(tl.int64) * heads + head
        at, stats = line * n, stats_row(line, n)
        q_base_ptr = head_base(q_ptr, batch, head, sqb, sqh)
        g_base_ptr = head_base(grad_ptr, batch, head, sgb, sgh)
        k_pos = load_positions(k_pos_ptr, batch, head, pkb, pkh, key, n, k_base)
        span = load_spans(spans_ptr, batch, head, seb, seh, key, key < n)
        word = load_optional(column_words_ptr, stats, key, key < n)
        d_span = tl.zeros([ROWS], tl.float32)
        for t in range(0, tl.load(counts_ptr + head * list_stride)):
            offset = tl.load(offsets_ptr + head * list_stride * most + t)
            row = key + offset
            keep = inside & (row >= begin) & (row < stop)
            q0, q1 = load_rows(q_base_ptr, first + offset, sqn * 8, keep, ROWS, D, D0, D1)
            g0, g1 = load_rows(g_base_ptr, first + offset, sgn * 8, keep, ROWS, D, D0, D1)
            delta = tl.load(delta_ptr + stats + row, mask=keep, other=0.0)
            shift = tl.load(shift_ptr + stats + row, mask=keep, other=float("inf"))
            q_pos = load_positions(q_pos_ptr, batch, head, pqb, pqh, row, n, q_base)
            row_word = load_optional(row_words_ptr, stats, row, keep)
            p, _, ds, slope = pair_gradient(
                q0, q1, k0, k1, v0, v1, g0, g1, shift, delta, q_pos, k_pos, key, begin, stop, span, bias_ptr, head,
                row_word, word, centre, extra, threshold, scale, softcap, inv_ramp, keep_scale,
                D1, SOFTCAP, k_pos_ptr is not None, row_words_ptr is not None, spans_ptr is not None,
            )  # fmt: skip
            dv0 += p[:, None] * g0.to(tl.float32)
            dk0 += ds[:, None] * q0.to(tl.float32)
            if D1 > 0:
                dv1 += p[:, None] * g1.to(tl.float32)
                dk1 += ds[:, None] * q1.to(tl.float32)
            if spans_ptr is not None:
                d_span += slope
        if spans_ptr is not None:
            tl.store(d_span_ptr + at + key, d_span, mask=key < n)
    dk_base, dv_base = head_base(dk_ptr, batch, kv_head, sob, soh), head_base(dv_ptr, batch, kv_head, sob, soh)
    store_tile(dk_base, first, son * 8, n, dk0 * scale, dk1 * scale, ROWS, D, D0, D1)
    store_tile(dv_base, first, son * 8, n, dv0, dv1, ROWS, D, D0, D1)


settle_keys(globals())
