"""Block-sparse flash attention, backward: dQ over query rows, dK and dV over key columns; no atomics.

Shapes as in ``forward``; ``grad_ptr`` is the output's gradient ``[B, H, Nq, D]``, ``delta_ptr [B * H, Nq]`` its product
with the output. dQ works on scores ``[M, K]`` (M queries, K keys of a step), dK and dV on the transposed ``[K, M]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_hf.ops.triton.common import (
    LOG2E,
    RUNTIME,
    add_product,
    bend_scores,
    dot_rows,
    dropout_kept,
    entry_fields,
    head_base,
    in_run,
    kept_pairs,
    list_place,
    load_entry,
    load_item,
    load_optional,
    load_positions,
    load_range,
    load_spans,
    load_tile,
    settle_keys,
    span_gate,
    stats_row,
    store_tile,
    work_place,
)

PREPARE_RUNTIME = ("sob", "soh", "son", "sgb", "sgh", "sgn", "pqb", "pqh", "n_q", "heads")


@triton.jit(do_not_specialize=PREPARE_RUNTIME)
def prepare_kernel(
    out_ptr, grad_ptr, lse_ptr, q_pos_ptr, delta_ptr, shift_ptr, sob, soh, son, sgb, sgh, sgn, pqb, pqh, n_q, heads,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """``delta = sum(out * grad_out)`` and the base-2 log-sum-exp, +inf for rows without a key (their p is then 0).

    Both are padded to tiles of ``STATS_TILE`` rows, by 0 and +inf. Grid ``[padded rows / ROWS, heads, batch]``.
    """
    first, head, batch = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    out_base = head_base(out_ptr, batch, head, sob, soh)
    grad_base = head_base(grad_ptr, batch, head, sgb, sgh)
    o0, o1 = load_tile(out_base, first, son * 8, n_q, ROWS, D, D0, D1, True)
    g0, g1 = load_tile(grad_base, first, sgn * 8, n_q, ROWS, D, D0, D1, True)
    delta = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    slot = first + tl.arange(0, ROWS)
    line = batch.to(tl.int64) * heads + head
    at = stats_row(line, n_q) + slot
    lse = tl.load(lse_ptr + line * n_q + slot, mask=slot < n_q, other=float("-inf"))
    kept = lse > float("-inf")
    if q_pos_ptr is not None:
        kept = kept & (load_positions(q_pos_ptr, batch, head, pqb, pqh, slot, None, 0) >= 0)
    tl.store(delta_ptr + at, delta)
    tl.store(shift_ptr + at, tl.where(kept, lse * LOG2E, float("inf")))


BACKWARD_RUNTIME = (*RUNTIME, "sgb", "sgh", "sgn", "flat", "key_tiles")


@triton.jit
def tile_probabilities(
    s, shift, q_slot, k_slot, q_local, k_local, q_pos, k_pos, kind, words_ptr, low, high, skip, span, bias_ptr,
    head, row_word, column_word, n_k, left, right, centre, extra, threshold, scale, softcap, inv_ramp, keep_scale,
    TILE_Q: tl.constexpr, WORDS: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, HAS_RANGE: tl.constexpr,
    RANGE_ON_FULL: tl.constexpr, HAS_KEYS: tl.constexpr, DROPOUT: tl.constexpr, HAS_SPANS: tl.constexpr,
):  # fmt: skip
    """From a raw product to the probability ``p`` and what its gradient needs:

    ``(p, p after dropout, dropout factor, d bent score / d scaled product, d p / d span before it is normalised)``; the
    last three mean something only with their option. All vectors are shaped for the tile, either way round.
    """
    s, t = bend_scores(s, q_pos, k_pos, bias_ptr, head, centre, extra, scale, softcap, SOFTCAP)
    s = s - shift  # before the mask: one fused multiply-add with the scale
    if MASKED:
        keep = kept_pairs(
            q_slot, k_slot, q_local, k_local, kind, words_ptr, low, high, skip, n_k, left, right, TILE_Q, WORDS,
            HAS_RANGE,
        )  # fmt: skip
        s = tl.where(keep, s, float("-inf"))
    elif RANGE_ON_FULL:
        s = tl.where(in_run(k_slot, low, high), s, float("-inf"))
    if HAS_KEYS:
        s = tl.where(k_pos >= 0, s, float("-inf"))
    if HAS_SPANS:
        gate, ramp = span_gate(q_pos, k_pos, span, inv_ramp)
        bare = tl.exp2(tl.where(gate > 0, s, float("-inf")))
        p = bare * gate
        slope = tl.where(ramp, bare * inv_ramp, 0.0)
    else:
        p = tl.exp2(s)
        slope = p
    p_out, factor, bend = p, p, p
    if DROPOUT:
        factor = tl.where(dropout_kept(row_word, column_word, threshold), keep_scale, 0.0)
        p_out = p * factor
    if SOFTCAP:
        bend = 1.0 - t * t
    return p, p_out, factor, bend, slope


@triton.jit
def score_gradient(dp, p, factor, bend, delta, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr):
    """``(d loss / d bent score, d loss / d scaled product, dp - delta)`` from ``dp = grad_out @ v^T``."""
    if DROPOUT:
        dp = dp * factor
    excess = dp - delta
    bent = p * excess
    raw = bent
    if SOFTCAP:
        raw = bent * bend
    return bent, raw, excess


@triton.jit
def row_gradients(
    q0, q1, k0, k1, g0, g1, v0, v1, shift, delta, q_slot, k_slot, q_first, k_first, q_pos, k_pos, kind, words_ptr,
    low, high, skip, span, bias_ptr, head, row_word, word, n_k, left, right, centre, extra, threshold, scale, softcap,
    inv_ramp, keep_scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D1: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, HAS_RANGE: tl.constexpr, RANGE_ON_FULL: tl.constexpr,
    HAS_KEYS: tl.constexpr, DROPOUT: tl.constexpr, HAS_SPANS: tl.constexpr,
):  # fmt: skip
    """``(d loss / d bent score, d loss / d scaled product)`` of pairs ``[M, K]``, the first at ``q_first, k_first`` of
    its tile."""
    p, _, factor, bend, _ = tile_probabilities(
        dot_rows(q0, q1, k0, k1, D1), shift[:, None], q_slot[:, None], k_slot[None, :],
        (q_first + tl.arange(0, BLOCK_Q))[:, None], (k_first + tl.arange(0, BLOCK_K))[None, :],
        q_pos[:, None], k_pos[None, :], kind, words_ptr, low[:, None], high[:, None],
        skip[:, None], span[None, :], bias_ptr, head, row_word[:, None], word[None, :], n_k, left, right,
        centre, extra, threshold, scale, softcap, inv_ramp, keep_scale, TILE_Q, (TILE_K + 31) // 32, SOFTCAP,
        MASKED, HAS_RANGE, RANGE_ON_FULL, HAS_KEYS, DROPOUT, HAS_SPANS,
    )  # fmt: skip
    bent, raw, _ = score_gradient(dot_rows(g0, g1, v0, v1, D1), p, factor, bend, delta[:, None], SOFTCAP, DROPOUT)
    return bent, raw


@triton.jit
def query_step(
    q0, q1, g0, g1, acc0, acc1, shift, delta, q_slot, q_pos, low, high, skip, row_word, k_base_ptr, v_base_ptr,
    words_ptr, range_ptr, k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr, batch, head, line, entry,
    part, sub, skn, svn, pkb, pkh, seb, seh, n_k, left, right, k_base, centre, extra, threshold, scale, softcap,
    inv_ramp, keep_scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, RANGE_ON_FULL: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the sum of dQ."""
    tile, kind = entry_fields(entry)
    k_first = tile * TILE_K + part * BLOCK_K
    k_slot = k_first + tl.arange(0, BLOCK_K)
    k0, k1 = load_tile(k_base_ptr, k_first, skn * 8, n_k, BLOCK_K, D, D0, D1, MASKED)
    v0, v1 = load_tile(v_base_ptr, k_first, svn * 8, n_k, BLOCK_K, D, D0, D1, MASKED)
    k_pos = load_positions(k_pos_ptr, batch, head, pkb, pkh, k_slot, None, k_base)
    span = load_spans(spans_ptr, batch, head, seb, seh, k_slot, None)
    word = load_optional(column_words_ptr, stats_row(line, n_k), k_slot, None)
    _, ds = row_gradients(
        q0, q1, k0, k1, g0, g1, v0, v1, shift, delta, q_slot, k_slot, sub * BLOCK_Q, part * BLOCK_K, q_pos, k_pos,
        kind, words_ptr, low, high, skip, span, bias_ptr, head, row_word, word, n_k, left, right, centre, extra,
        threshold, scale, softcap, inv_ramp, keep_scale, TILE_Q, TILE_K, BLOCK_Q, BLOCK_K, D1, SOFTCAP, MASKED,
        range_ptr is not None, RANGE_ON_FULL, k_pos_ptr is not None, row_words_ptr is not None, spans_ptr is not None,
    )  # fmt: skip
    return add_product(ds, k0, k1, acc0, acc1, D1)


@triton.jit(do_not_specialize=BACKWARD_RUNTIME)
def query_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, shift_ptr, dq_ptr, part_ptr,
    items_ptr, entries_ptr, words_ptr, range_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr,
    row_words_ptr, column_words_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sob, soh, son, pqb, pqh, pkb, pkh, seb, seh, srb, srh,
    n_q, n_k, heads, group, list_heads, rep_heads, reps, slots, query_tiles, left, right, q_base, k_base, centre, extra,
    threshold, scale, softcap, inv_ramp, keep_scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SOFTCAP: tl.constexpr, RANGE_COLUMNS: tl.constexpr, RANGE_ON_FULL: tl.constexpr, MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """dQ; grid and work items as in the forward."""
    SUBS: tl.constexpr = TILE_Q // BLOCK_Q
    STEPS: tl.constexpr = TILE_K // BLOCK_K
    item, sub, rep = work_place(reps, SUBS)
    row, begin, middle, end, slot = load_item(items_ptr, item)
    if row < 0:
        return
    batch, head = list_place(row, rep, query_tiles, list_heads, rep_heads)
    kv_head = head // group
    first = row % query_tiles * TILE_Q + sub * BLOCK_Q
    q_slot = first + tl.arange(0, BLOCK_Q)
    q_pos = load_positions(q_pos_ptr, batch, head, pqb, pqh, q_slot, None, q_base)
    low, high, skip = load_range(range_ptr, batch, head, srb, srh, q_slot, n_q, RANGE_COLUMNS)
    q0, q1 = load_tile(head_base(q_ptr, batch, head, sqb, sqh), first, sqn * 8, n_q, BLOCK_Q, D, D0, D1, True)
    g0, g1 = load_tile(head_base(grad_ptr, batch, head, sgb, sgh), first, sgn * 8, n_q, BLOCK_Q, D, D0, D1, True)
    k_base_ptr = head_base(k_ptr, batch, kv_head, skb, skh)
    v_base_ptr = head_base(v_ptr, batch, kv_head, svb, svh)
    line = batch.to(tl.int64) * heads + head
    row_word = load_optional(row_words_ptr, stats_row(line, n_q), q_slot, None)
    delta = tl.load(delta_ptr + stats_row(line, n_q) + q_slot)
    shift = tl.load(shift_ptr + stats_row(line, n_q) + q_slot)

    acc0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else 16], tl.float32)
    entry = load_entry(entries_ptr, begin * STEPS, end * STEPS, STEPS)
    for phase in tl.static_range(2):
        first_step, last_step = (begin if phase == 0 else middle) * STEPS, (middle if phase == 0 else end) * STEPS
        for step in tl.range(first_step, last_step, num_stages=MASKED_STAGES if phase == 1 else None):
            following = load_entry(entries_ptr, step + 1, end * STEPS, STEPS)
            acc0, acc1 = query_step(
                q0, q1, g0, g1, acc0, acc1, shift, delta, q_slot, q_pos, low, high, skip, row_word, k_base_ptr,
                v_base_ptr, words_ptr, range_ptr, k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr,
                batch, head, line, entry, step % STEPS, sub, skn, svn, pkb, pkh, seb, seh, n_k, left, right, k_base,
                centre, extra, threshold, scale, softcap, inv_ramp, keep_scale,
                TILE_Q, TILE_K, BLOCK_Q, BLOCK_K, D, D0, D1, SOFTCAP, phase == 1, RANGE_ON_FULL,
            )  # fmt: skip
            entry = following
    acc0 = acc0 * scale
    acc1 = acc1 * scale
    if slot < 0:
        base = head_base(dq_ptr, batch, head, sob, soh)
        store_tile(base, first, son * 8, n_q, acc0, acc1, BLOCK_Q, D, D0, D1)
    else:
        piece = (rep.to(tl.int64) * slots + slot) * TILE_Q
        store_tile(part_ptr + piece * D, sub * BLOCK_Q, D, TILE_Q, acc0, acc1, BLOCK_Q, D, D0, D1)


@triton.jit
def query_place(packed, out_head, flat, query_tiles, GROUPED: tl.constexpr):
    """``query head, tile`` of an entry of a list by key."""
    head, tile = out_head, packed
    if GROUPED:
        head = out_head * flat + packed // query_tiles
        tile = packed % query_tiles
    return head, tile


@triton.jit
def key_step(
    k0, k1, v0, v1, dk0, dk1, dv0, dv1, d_span, k_slot, span, q_ptr, grad_ptr, delta_ptr, shift_ptr, words_ptr,
    range_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr, batch, head, kind, q_tile,
    part, sub, sqb, sqh, sqn, sgb, sgh, sgn, pqb, pqh, pkb, pkh, srb, srh, n_q, n_k, heads, left, right, q_base,
    k_base, centre, extra, threshold, scale, softcap, inv_ramp, keep_scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, SOFTCAP: tl.constexpr, RANGE_COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    RANGE_ON_FULL: tl.constexpr,
):  # fmt: skip
    """One tile of queries into the sums of dK, dV and the spans' gradient."""
    q_first = q_tile * TILE_Q + part * BLOCK_Q
    q_slot = q_first + tl.arange(0, BLOCK_Q)
    q_base_ptr = head_base(q_ptr, batch, head, sqb, sqh)
    g_base_ptr = head_base(grad_ptr, batch, head, sgb, sgh)
    q0, q1 = load_tile(q_base_ptr, q_first, sqn * 8, n_q, BLOCK_Q, D, D0, D1, MASKED)
    line = batch.to(tl.int64) * heads + head
    shift = tl.load(shift_ptr + stats_row(line, n_q) + q_slot)
    q_pos = load_positions(q_pos_ptr, batch, head, pqb, pqh, q_slot, None, q_base)
    k_pos = load_positions(k_pos_ptr, batch, head, pkb, pkh, k_slot, None, k_base)
    low, high, skip = load_range(range_ptr, batch, head, srb, srh, q_slot, n_q, RANGE_COLUMNS)
    row_word = load_optional(row_words_ptr, stats_row(line, n_q), q_slot, None)
    word = load_optional(column_words_ptr, stats_row(line, n_k), k_slot, None)
    p, p_out, factor, bend, slope = tile_probabilities(
        dot_rows(k0, k1, q0, q1, D1), shift[None, :], q_slot[None, :], k_slot[:, None],
        (part * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :], (sub * BLOCK_K + tl.arange(0, BLOCK_K))[:, None],
        q_pos[None, :], k_pos[:, None], kind, words_ptr, low[None, :], high[None, :],
        skip[None, :], span[:, None], bias_ptr, head, row_word[None, :], word[:, None], n_k, left, right,
        centre, extra, threshold, scale, softcap, inv_ramp, keep_scale, TILE_Q, (TILE_K + 31) // 32, SOFTCAP,
        MASKED, range_ptr is not None, RANGE_ON_FULL, k_pos_ptr is not None, row_words_ptr is not None,
        spans_ptr is not None,
    )  # fmt: skip
    g0, g1 = load_tile(g_base_ptr, q_first, sgn * 8, n_q, BLOCK_Q, D, D0, D1, MASKED)
    dv0, dv1 = add_product(p_out, g0, g1, dv0, dv1, D1)
    delta = tl.load(delta_ptr + stats_row(line, n_q) + q_slot)
    _, ds, excess = score_gradient(
        dot_rows(v0, v1, g0, g1, D1), p, factor, bend, delta[None, :], SOFTCAP, row_words_ptr is not None
    )
    dk0, dk1 = add_product(ds, q0, q1, dk0, dk1, D1)
    if spans_ptr is not None:
        d_span += tl.sum(slope * excess, 1)
    return dk0, dk1, dv0, dv1, d_span


@triton.jit
def store_key_sums(
    dk0, dk1, dv0, dv1, d_span, k_slot, dk_ptr, dv_ptr, d_span_ptr, part_k_ptr, part_v_ptr, part_span_ptr, batch, head,
    line, first, sub, rep, slot, slots, sob, soh, son, n_k,
    TILE_K: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """The sums of :func:`key_step` into the gradients, or into the slot of a piece of a cut list."""
    if slot < 0:
        store_tile(head_base(dk_ptr, batch, head, sob, soh), first, son * 8, n_k, dk0, dk1, BLOCK_K, D, D0, D1)
        store_tile(head_base(dv_ptr, batch, head, sob, soh), first, son * 8, n_k, dv0, dv1, BLOCK_K, D, D0, D1)
        if d_span_ptr is not None:
            tl.store(d_span_ptr + line * n_k + k_slot, d_span, mask=k_slot < n_k)
    else:
        piece = (rep.to(tl.int64) * slots + slot) * TILE_K
        store_tile(part_k_ptr + piece * D, sub * BLOCK_K, D, TILE_K, dk0, dk1, BLOCK_K, D, D0, D1)
        store_tile(part_v_ptr + piece * D, sub * BLOCK_K, D, TILE_K, dv0, dv1, BLOCK_K, D, D0, D1)
        if d_span_ptr is not None:
            tl.store(part_span_ptr + piece + sub * BLOCK_K + tl.arange(0, BLOCK_K), d_span)


@triton.jit(do_not_specialize=BACKWARD_RUNTIME)
def key_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, shift_ptr, dk_ptr, dv_ptr, d_span_ptr,
    part_k_ptr, part_v_ptr, part_span_ptr,
    items_ptr, entries_ptr, words_ptr, range_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr,
    row_words_ptr, column_words_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sob, soh, son, pqb, pqh, pkb, pkh, seb, seh, srb, srh,
    n_q, n_k, heads, group, list_heads, rep_heads, reps, slots, query_tiles, left, right, q_base, k_base, centre, extra,
    threshold, scale, softcap, inv_ramp, keep_scale, flat, key_tiles,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SOFTCAP: tl.constexpr, RANGE_COLUMNS: tl.constexpr, RANGE_ON_FULL: tl.constexpr, GROUPED: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """dK, dV and the gradient of the spans from the transposed score tile ``K Q^T`` (it spills far less).

    A list holds the tiles of ``flat`` query heads that share the key head: all of a group, or one where the gradient
    of the spans is wanted by query head; ``GROUPED`` says that they are several. Grid
    ``[items * (TILE_K / BLOCK_K) * reps]``.
    """
    SUBS: tl.constexpr = TILE_K // BLOCK_K
    STEPS: tl.constexpr = TILE_Q // BLOCK_Q
    item, sub, rep = work_place(reps, SUBS)
    row, begin, middle, end, slot = load_item(items_ptr, item)
    if row < 0:
        return
    batch, out_head = list_place(row, rep, key_tiles, list_heads, rep_heads)
    kv_head = out_head * flat // group
    first = row % key_tiles * TILE_K + sub * BLOCK_K
    k_slot = first + tl.arange(0, BLOCK_K)
    k0, k1 = load_tile(head_base(k_ptr, batch, kv_head, skb, skh), first, skn * 8, n_k, BLOCK_K, D, D0, D1, True)
    v0, v1 = load_tile(head_base(v_ptr, batch, kv_head, svb, svh), first, svn * 8, n_k, BLOCK_K, D, D0, D1, True)
    # The gate depends on the query head: where there is one, a list has one query head.
    span = load_spans(spans_ptr, batch, out_head, seb, seh, k_slot, None)

    dk0 = tl.zeros([BLOCK_K, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_K, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else 16], tl.float32)
    dv1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else 16], tl.float32)
    d_span = tl.zeros([BLOCK_K], tl.float32)
    entry = load_entry(entries_ptr, begin * STEPS, end * STEPS, STEPS)
    for phase in tl.static_range(2):
        first_step, last_step = (begin if phase == 0 else middle) * STEPS, (middle if phase == 0 else end) * STEPS
        for step in tl.range(first_step, last_step, num_stages=MASKED_STAGES if phase == 1 else None):
            following = load_entry(entries_ptr, step + 1, end * STEPS, STEPS)
            part = step % STEPS
            packed, kind = entry_fields(entry)
            head, q_tile = query_place(packed, out_head, flat, query_tiles, GROUPED)
            dk0, dk1, dv0, dv1, d_span = key_step(
                k0, k1, v0, v1, dk0, dk1, dv0, dv1, d_span, k_slot, span, q_ptr, grad_ptr, delta_ptr, shift_ptr,
                words_ptr, range_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr,
                batch, head, kind, q_tile, part, sub, sqb, sqh, sqn, sgb, sgh, sgn, pqb, pqh, pkb, pkh, srb, srh, n_q,
                n_k, heads, left, right, q_base, k_base, centre, extra, threshold, scale, softcap, inv_ramp, keep_scale,
                TILE_Q, TILE_K, BLOCK_Q, BLOCK_K, D, D0, D1, SOFTCAP, RANGE_COLUMNS, phase == 1, RANGE_ON_FULL,
            )  # fmt: skip
            entry = following
    dk0 = dk0 * scale
    dk1 = dk1 * scale
    store_key_sums(
        dk0, dk1, dv0, dv1, d_span, k_slot, dk_ptr, dv_ptr, d_span_ptr, part_k_ptr, part_v_ptr, part_span_ptr, batch,
        out_head, batch.to(tl.int64) * (heads // flat) + out_head, first, sub, rep, slot, slots, sob, soh, son, n_k,
        TILE_K, BLOCK_K, D, D0, D1,
    )  # fmt: skip


settle_keys(globals())
