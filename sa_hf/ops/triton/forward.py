"""Block-sparse flash attention, forward: one program per work item, online softmax in base 2, fp32 accumulation.

Shapes: ``q_ptr, out_ptr [B, H, Nq, D]``, ``k_ptr, v_ptr [B, Hkv, Nk, D]``, ``lse_ptr [B * H, Nq]``. A step has M =
BLOCK_Q queries and K = BLOCK_K keys: ``q0, acc0 [M, D0]`` and ``q1, acc1 [M, D1]`` (head_dim in two chunks), scores
``[M, K]``, ``peak, total, low, high [M]``. ``part_ptr [slots, TILE_Q, D]`` holds the results of cut lists until
``combine_kernel`` merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_hf.ops.triton.common import (
    LN2,
    LOG2E,
    RUNTIME,
    add_product,
    bend_scores,
    dot_rows,
    dropout_kept,
    empty_sums,
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


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    items_ptr, entries_ptr, words_ptr, range_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, spans_ptr,
    row_words_ptr, column_words_ptr,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, pqb, pqh, pkb, pkh, seb, seh, srb, srh,
    n_q, n_k, heads, group, list_heads, rep_heads, reps, slots, query_tiles, left, right, q_base, k_base, centre, extra,
    threshold, scale, softcap, inv_ramp, keep_scale,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SOFTCAP: tl.constexpr, RANGE_COLUMNS: tl.constexpr, RANGE_ON_FULL: tl.constexpr, MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid ``[items * (TILE_Q / BLOCK_Q) * reps]``; ``reps = rep_heads * rep_batch`` repeats lists that are shared."""
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
    q_base_ptr = head_base(q_ptr, batch, head, sqb, sqh)
    k_base_ptr = head_base(k_ptr, batch, kv_head, skb, skh)
    v_base_ptr = head_base(v_ptr, batch, kv_head, svb, svh)
    q0, q1 = load_tile(q_base_ptr, first, sqn * 8, n_q, BLOCK_Q, D, D0, D1, True)
    line = batch.to(tl.int64) * heads + head
    row_word = load_optional(row_words_ptr, stats_row(line, n_q), q_slot, None)

    peak, total, acc0, acc1 = empty_sums(BLOCK_Q, D0, D1)
    word = load_entry(entries_ptr, begin * STEPS, end * STEPS, STEPS)
    for phase in tl.static_range(2):
        first_step, last_step = (begin if phase == 0 else middle) * STEPS, (middle if phase == 0 else end) * STEPS
        for step in tl.range(first_step, last_step, num_stages=MASKED_STAGES if phase == 1 else None):
            following = load_entry(entries_ptr, step + 1, end * STEPS, STEPS)
            peak, total, acc0, acc1 = forward_step(
                step, word, q0, q1, peak, total, acc0, acc1, k_base_ptr, v_base_ptr, words_ptr,
                range_ptr, k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr, q_slot, q_pos, low, high,
                skip, row_word, batch, head, line, skn, svn, pkb, pkh, seb, seh, sub, n_q, n_k, left, right, k_base,
                centre, extra, threshold, scale, softcap, inv_ramp,
                TILE_Q, TILE_K, BLOCK_Q, BLOCK_K, D, D0, D1, SOFTCAP, phase == 1, RANGE_ON_FULL,
            )  # fmt: skip
            word = following

    kept = total > 0
    if q_pos_ptr is not None:
        kept = kept & (q_pos >= 0)
    inverse = tl.where(kept, 1.0 / tl.where(kept, total, 1.0), 0.0)
    lse = tl.where(kept, (peak + tl.log2(tl.where(kept, total, 1.0))) * LN2, float("-inf"))
    if row_words_ptr is not None:
        inverse = inverse * keep_scale
    acc0 = acc0 * inverse[:, None]
    acc1 = acc1 * inverse[:, None]
    if slot < 0:
        out_base = head_base(out_ptr, batch, head, sob, soh)
        store_tile(out_base, first, son * 8, n_q, acc0, acc1, BLOCK_Q, D, D0, D1)
        tl.store(lse_ptr + line * n_q + q_slot, lse, mask=q_slot < n_q)
    else:
        piece = (rep.to(tl.int64) * slots + slot) * TILE_Q
        store_tile(part_ptr + piece * D, sub * BLOCK_Q, D, TILE_Q, acc0, acc1, BLOCK_Q, D, D0, D1)
        tl.store(part_lse_ptr + piece + sub * BLOCK_Q + tl.arange(0, BLOCK_Q), lse)


@triton.jit
def forward_step(
    step, word, q0, q1, peak, total, acc0, acc1, k_base_ptr, v_base_ptr, words_ptr, range_ptr,
    k_pos_ptr, bias_ptr, spans_ptr, row_words_ptr, column_words_ptr, q_slot, q_pos, low, high, skip, row_word,
    batch, head, line, skn, svn, pkb, pkh, seb, seh, sub, n_q, n_k, left, right, k_base, centre, extra, threshold,
    scale, softcap, inv_ramp,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, RANGE_ON_FULL: tl.constexpr,
):  # fmt: skip
    """One ``BLOCK_Q x BLOCK_K`` tile into the running softmax."""
    PLAIN: tl.constexpr = (not SOFTCAP) and (bias_ptr is None)
    part = step % (TILE_K // BLOCK_K)
    tile, kind = entry_fields(word)
    first = tile * TILE_K + part * BLOCK_K
    k_slot = first + tl.arange(0, BLOCK_K)
    k0, k1 = load_tile(k_base_ptr, first, skn * 8, n_k, BLOCK_K, D, D0, D1, MASKED)
    s = dot_rows(q0, q1, k0, k1, D1)
    k_pos = load_positions(k_pos_ptr, batch, head, pkb, pkh, k_slot, None, k_base)
    unit = scale * LOG2E
    if not PLAIN:
        s, _ = bend_scores(s, q_pos[:, None], k_pos[None, :], bias_ptr, head, centre, extra, scale, softcap, SOFTCAP)
        unit = 1.0
    if MASKED:
        keep = kept_pairs(
            q_slot[:, None], k_slot[None, :], (sub * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None],
            (part * BLOCK_K + tl.arange(0, BLOCK_K))[None, :], kind, words_ptr,
            low[:, None], high[:, None], skip[:, None], n_k, left, right, TILE_Q, (TILE_K + 31) // 32,
            range_ptr is not None,
        )  # fmt: skip
        s = tl.where(keep, s, float("-inf"))
    elif RANGE_ON_FULL:
        s = tl.where(in_run(k_slot[None, :], low[:, None], high[:, None]), s, float("-inf"))
    if k_pos_ptr is not None:
        s = tl.where((k_pos >= 0)[None, :], s, float("-inf"))
    if spans_ptr is not None:
        span = load_spans(spans_ptr, batch, head, seb, seh, k_slot, None)
        gate, _ = span_gate(q_pos[:, None], k_pos[None, :], span[None, :], inv_ramp)
        s = tl.where(gate > 0, s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1) * unit)
    shift = new_peak
    if MASKED or RANGE_ON_FULL or (k_pos_ptr is not None) or (spans_ptr is not None):
        # A row without a key so far: -inf - -inf has no value.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s * unit - shift[:, None])
    if spans_ptr is not None:
        p = p * gate
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(p, 1)
    acc0 = acc0 * decay[:, None]
    if D1 > 0:
        acc1 = acc1 * decay[:, None]
    if row_words_ptr is not None:
        word = load_optional(column_words_ptr, stats_row(line, n_k), k_slot, None)
        p = tl.where(dropout_kept(row_word[:, None], word[None, :], threshold), p, 0.0)
    v0, v1 = load_tile(v_base_ptr, first, svn * 8, n_k, BLOCK_K, D, D0, D1, MASKED)
    acc0, acc1 = add_product(p, v0, v1, acc0, acc1, D1)
    return new_peak, total, acc0, acc1


COMBINE_RUNTIME = ("sob", "soh", "son", "n", "heads", "list_heads", "rep_heads", "reps", "slots", "tiles")


@triton.jit(do_not_specialize=COMBINE_RUNTIME)
def combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits_ptr, sob, soh, son, n, heads,
    list_heads, rep_heads, reps, slots, tiles,
    TILE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """The pieces of a cut list, in their order: merged by log-sum-exp, or summed (``lse`` too, where there is one).

    Grid ``[splits * (TILE / ROWS) * reps]``.
    """
    split, sub, rep = work_place(reps, TILE // ROWS)
    at = splits_ptr + split * 3
    row, first_slot, pieces = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    if row < 0:
        return
    batch, head = list_place(row, rep, tiles, list_heads, rep_heads)
    peak, total, acc0, acc1 = empty_sums(ROWS, D0, D1)
    for piece in range(0, pieces):
        place = (rep.to(tl.int64) * slots + first_slot + piece) * TILE + sub * ROWS
        x0, x1 = load_tile(part_ptr + place * D, row * 0, D, ROWS, ROWS, D, D0, D1, False)
        if SOFTMAX:
            lse = tl.load(part_lse_ptr + place + tl.arange(0, ROWS)) * LOG2E
            new_peak = tl.maximum(peak, lse)
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            decay, weight = tl.exp2(peak - shift), tl.exp2(lse - shift)
            total = total * decay + weight
            acc0 = acc0 * decay[:, None] + x0 * weight[:, None]
            if D1 > 0:
                acc1 = acc1 * decay[:, None] + x1 * weight[:, None]
            peak = new_peak
        else:
            acc0 += x0
            if D1 > 0:
                acc1 += x1
            if part_lse_ptr is not None:
                total += tl.load(part_lse_ptr + place + tl.arange(0, ROWS))
    first = row % tiles * TILE + sub * ROWS
    slot = first + tl.arange(0, ROWS)
    if SOFTMAX:
        safe = tl.where(total > 0, total, 1.0)
        acc0 = acc0 / safe[:, None]
        acc1 = acc1 / safe[:, None]
        total = tl.where(total > 0, (peak + tl.log2(safe)) * LN2, float("-inf"))
    if lse_ptr is not None:
        tl.store(lse_ptr + (batch.to(tl.int64) * heads + head) * n + slot, total, mask=slot < n)
    store_tile(head_base(out_ptr, batch, head, sob, soh), first, son * 8, n, acc0, acc1, ROWS, D, D0, D1)


settle_keys(globals())
