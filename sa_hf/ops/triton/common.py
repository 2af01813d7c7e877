"""Device functions that the kernels share: tile loads, the score's options, the pair predicate, the dropout bits.

Names: ``*_ptr`` pointers, ``s*`` strides in units of 8 elements, upper case compile-time constants. The pair functions
broadcast: query vectors ``[M, 1]`` with key vectors ``[1, N]`` give the tile of the forward and of dQ, ``[1, M]`` with
``[N, 1]`` the transposed tile of dK/dV.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BAND_TILE = tl.constexpr(-2)
# What the backward knows of query rows is padded to whole tiles of the largest size: tiles read it without a mask.
STATS_TILE = tl.constexpr(128)
# The interpreter keeps bfloat16 as raw bits and would multiply those: there, products get fp32 copies of the operands.
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
# Lengths, counts, strides and scalars: a new value is never a new kernel. Strides are in units of 8 elements, so that
# the compiler still sees 16-byte alignment.
RUNTIME = (
    "sqb", "sqh", "sqn", "skb", "skh", "skn", "svb", "svh", "svn", "sob", "soh", "son",
    "pqb", "pqh", "pkb", "pkh", "seb", "seh", "srb", "srh", "n_q", "n_k", "heads", "group", "list_heads", "rep_heads",
    "reps", "slots", "query_tiles", "left", "right", "q_base", "k_base", "centre", "extra", "threshold",
    "scale", "softcap", "inv_ramp", "keep_scale",
)  # fmt: skip


@triton.jit
def head_base(pointer, batch, head, batch_stride, head_stride):
    """Where the rows of a head begin; strides in units of 8 elements."""
    return pointer + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * 8


@triton.jit
def load_tile(
    base, first, stride, limit,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows ``first .. first + ROWS`` of a head's ``[slots, D]`` as two chunks ``[ROWS, D0]``, ``[ROWS, D1]``."""
    rows = tl.arange(0, ROWS)
    pointers = base + first.to(tl.int64) * stride + rows[:, None] * stride
    valid = (first + rows < limit)[:, None]
    if MASKED:
        x0 = tl.load(pointers + tl.arange(0, D0)[None, :], mask=valid, other=0.0)
    else:
        x0 = tl.load(pointers + tl.arange(0, D0)[None, :])
    x1 = x0
    if D1 > 0:
        tail = D0 + tl.arange(0, D1)[None, :]
        if MASKED:
            x1 = tl.load(pointers + tail, mask=valid & (tail < D), other=0.0)
        elif D0 + D1 > D:
            x1 = tl.load(pointers + tail, mask=tail < D, other=0.0)
        else:
            x1 = tl.load(pointers + tail)
    return x0, x1


@triton.jit
def load_rows(base, first, stride, valid, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """:func:`load_tile` of any run of rows: ``first`` may be negative, ``valid [ROWS]`` says which are read."""
    pointers = base + first.to(tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride
    x0 = tl.load(pointers + tl.arange(0, D0)[None, :], mask=valid[:, None], other=0.0)
    x1 = x0
    if D1 > 0:
        tail = D0 + tl.arange(0, D1)[None, :]
        x1 = tl.load(pointers + tail, mask=valid[:, None] & (tail < D), other=0.0)
    return x0, x1


@triton.jit
def store_tile(
    base, first, stride, limit, x0, x1,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """The adjoint of :func:`load_tile`: rows past ``limit`` and columns past D are not written."""
    rows = tl.arange(0, ROWS)
    pointers = base + first.to(tl.int64) * stride + rows[:, None] * stride
    valid = (first + rows < limit)[:, None]
    kind = base.dtype.element_ty
    tl.store(pointers + tl.arange(0, D0)[None, :], x0.to(kind), mask=valid)
    if D1 > 0:
        tail = D0 + tl.arange(0, D1)[None, :]
        tl.store(pointers + tail, x1.to(kind), mask=valid & (tail < D))


@triton.jit
def dot_rows(a0, a1, b0, b1, D1: tl.constexpr):
    """``a @ b^T`` of two chunked tiles, fp32."""
    s = product(a0, tl.trans(b0), None)
    if D1 > 0:
        s = product(a1, tl.trans(b1), s)
    return s


@triton.jit
def add_product(p, x0, x1, acc0, acc1, D1: tl.constexpr):
    """``acc + p @ x`` for a chunked tile x; p is rounded to x's dtype."""
    p = p.to(x0.dtype)
    acc0 = product(p, x0, acc0)
    if D1 > 0:
        acc1 = product(p, x1, acc1)
    return acc0, acc1


@triton.jit
def product(a, b, acc):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_positions(pointer, batch, head, batch_stride, head_stride, slots, limit, base):
    """int32 positions of slots; -1 is an empty slot. Without an index tensor, ``slot + base``.

    Strides in units of 8 elements. A ``limit`` of None says that the slots are those of a tile, which the padding of
    the tensor covers: a mask would cost a predicate and a load of its own for each number.
    """
    if pointer is None:
        positions = slots + base
    else:
        row = pointer + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * 8
        if limit is None:
            positions = tl.load(row + slots)
        else:
            positions = tl.load(row + slots, mask=(slots >= 0) & (slots < limit), other=-1)
    return positions


@triton.jit
def bend_scores(s, q_pos, k_pos, bias_ptr, head, centre, extra, scale, softcap, SOFTCAP: tl.constexpr):
    """``(score * log2(e), tanh)`` of a raw product; the tanh is that of the softcap, for its gradient."""
    t = s
    if SOFTCAP:
        x = s * (scale / softcap)
        # exp2 of a non-positive number: no overflow at either end.
        decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        t = tl.where(x >= 0, 1.0, -1.0) * (1.0 - decay) / (1.0 + decay)
        s = t * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    if bias_ptr is not None:
        row = bias_ptr + head.to(tl.int64) * (2 * centre + 1) + centre
        distance = tl.minimum(tl.maximum(k_pos - q_pos, -centre), centre)
        s += tl.where((q_pos >= extra) & (k_pos >= extra), tl.load(row + distance), 0.0)
    return s, t


@triton.jit
def span_gate(q_pos, k_pos, span, inv_ramp):
    """The expire-span gate m and whether its slope is ``inv_ramp`` there (strictly inside the ramp)."""
    raw = 1.0 + (span - (q_pos - k_pos)) * inv_ramp
    own = q_pos == k_pos
    gate = tl.where(own, 1.0, tl.minimum(tl.maximum(raw, 0.0), 1.0))
    return gate, (raw > 0) & (raw < 1) & (q_pos != k_pos)


@triton.jit
def in_run(x, first, last):
    """``first <= x < last`` by one comparison."""
    return (x - first).to(tl.uint32, bitcast=True) < tl.maximum(last - first, 0).to(tl.uint32, bitcast=True)


@triton.jit
def kept_pairs(
    q_slot, k_slot, q_local, k_local, kind, words_ptr, low, high, skip, n_k, left, right,
    TILE_Q: tl.constexpr, WORDS: tl.constexpr, HAS_RANGE: tl.constexpr,
):  # fmt: skip
    """The predicate of a tile that is not full: end of the slots, band or element mask, key range."""
    # The keys of a query are a run: two vectors and one unsigned comparison per pair. Rows past the last query need no
    # test: the forward never stores them, and in the backward their log-sum-exp is +inf.
    first = tl.where(kind == BAND_TILE, q_slot - left, 0)
    last = tl.minimum(tl.where(kind == BAND_TILE, q_slot + right + 1, n_k), n_k)
    if HAS_RANGE:
        first = tl.maximum(first, low)
        last = tl.minimum(last, high)
    keep = in_run(k_slot, first, last)
    if words_ptr is not None:
        row = words_ptr + tl.maximum(kind, 0).to(tl.int64) * (TILE_Q * WORDS) + q_local * WORDS
        word = tl.load(row)
        for w in tl.static_range(1, WORDS):
            word = tl.where(k_local >= w * 32, tl.load(row + w), word)
        keep = keep & ((kind < 0) | (((word >> (k_local & 31)) & 1) != 0))
    if HAS_RANGE:
        keep = keep & (k_slot != skip)
    return keep


@triton.jit
def load_range(range_ptr, batch, head, batch_stride, head_stride, slots, n_q, RANGE_COLUMNS: tl.constexpr):
    """``low, high, skip`` of query slots, empty past the end; without ranges three vectors that nobody reads."""
    low, high, skip = slots, slots, slots
    if range_ptr is not None:
        row = range_ptr + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride)
        row += slots.to(tl.int64) * RANGE_COLUMNS
        inside = slots < n_q
        low = tl.load(row, mask=inside, other=0)
        high = tl.load(row + 1, mask=inside, other=0)
        skip = low - 1
        if RANGE_COLUMNS == 3:
            skip = tl.load(row + 2, mask=inside, other=-1)
    return low, high, skip


@triton.jit
def load_optional(pointer, at, slots, valid):
    """The numbers of slots, from offset ``at`` on, 0 where not valid (None: all slots of a tile, see
    :func:`load_positions`); without a pointer a vector that nobody reads."""
    values = slots
    if pointer is not None:
        values = tl.load(pointer + at + slots) if valid is None else tl.load(pointer + at + slots, mask=valid, other=0)
    return values


@triton.jit
def load_spans(spans_ptr, batch, head, batch_stride, head_stride, slots, valid):
    """:func:`load_optional` of the expire-spans of key slots; strides in units of 8 elements."""
    row = (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * 8
    return load_optional(spans_ptr, row, slots, valid)


@triton.jit
def dropout_kept(row_word, column_word, threshold):
    """``ops.random.dropout_keep`` of two int32 words."""
    return (row_word ^ column_word) * (row_word | 1) >= threshold


@triton.jit
def empty_sums(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """``peak, total, acc0, acc1`` of a softmax in base 2 that has met no key."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, D0], tl.float32)
    acc1 = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    return peak, total, acc0, acc1


@triton.jit
def load_entry(entries_ptr, step, stop, STEPS: tl.constexpr):
    """The entry of a step as :func:`entry_fields` takes it; a tile is ``STEPS`` steps long. Loops load the next step's
    and carry it: were it loaded where it is used, the pipeline would spend a stage on it and fetch K and V no earlier
    than they are needed."""
    return tl.load(entries_ptr + step // STEPS, mask=step < stop, other=0)


@triton.jit
def entry_fields(word):
    """``(tile on the other side, kind)`` of a list's entry."""
    return word.to(tl.int32), (word >> 32).to(tl.int32)


@triton.jit
def load_item(items_ptr, item):
    """``row, begin, middle, end, slot`` of a work item (``lists.WorkList``)."""
    at = items_ptr + item * 5
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit
def stats_row(line, n_q):
    """Where the padded numbers of a head's rows begin: ``delta``, ``shift`` and the dropout words."""
    return line.to(tl.int64) * (tl.cdiv(n_q, STATS_TILE) * STATS_TILE)


@triton.jit
def work_place(reps, SUBS: tl.constexpr):
    """``item, part, repetition`` of this program: work items cut into SUBS parts, each run ``reps`` times."""
    pid = tl.program_id(0)
    return pid // reps // SUBS, pid // reps % SUBS, pid % reps


@triton.jit
def list_place(row, rep, tiles, list_heads, rep_heads):
    """``batch row, head`` of a row of a list, in one of the list's repetitions over heads and batch rows."""
    list_of = row // tiles
    return list_of // list_heads + rep // rep_heads, list_of % list_heads + rep % rep_heads


@triton.jit
def gather_rows(base, index, stride, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows ``index`` of a head's ``[slots, D]`` as two chunks; those that are not valid are 0."""
    pointers = base + index.to(tl.int64)[:, None] * stride
    x0 = tl.load(pointers + tl.arange(0, D0)[None, :], mask=valid[:, None], other=0.0)
    x1 = x0
    if D1 > 0:
        tail = D0 + tl.arange(0, D1)[None, :]
        x1 = tl.load(pointers + tail, mask=valid[:, None] & (tail < D), other=0.0)
    return x0, x1


@triton.jit
def store_rows(rows, x0, x1, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The adjoint of :func:`gather_rows`: chunks to the row pointers ``[R, 1]``."""
    kind = rows.dtype.element_ty
    tl.store(rows + tl.arange(0, D0)[None, :], x0.to(kind), mask=valid[:, None])
    if D1 > 0:
        tail = D0 + tl.arange(0, D1)[None, :]
        tl.store(rows + tail, x1.to(kind), mask=valid[:, None] & (tail < D))


def settle_keys(names: Mapping[str, object]) -> None:
    """Make the keys of a module's functions, under which Triton keeps compiled kernels on disk: callees first.

    The key of a caller takes in the globals of a function that it calls only where that function's own key was made
    before (``DependenciesFinder._update_hash`` of Triton 3.6; 3.9 makes it first). Left to the first launches it would
    depend on their order, and a process would compile again what another had compiled (255 of the GPU suite's 387).
    """
    made = [x for x in names.values() if isinstance(x, triton.runtime.JITFunction)]
    for function in sorted(made, key=lambda x: x.__name__.endswith("_kernel")):
        _ = function.cache_key


settle_keys(globals())
