"""Launchers of the block kernels: forward, dQ, dK/dV and the gradient of a distance table over :class:`TileLists`.

Contract: query ``[B, H, query_slots, D]``, key and value ``[B, Hk, key_slots, D]`` (``Hk`` divides H), any strides;
results as in ``ops.engine.Engine``. No host read in the steady state (the lists are kept with their layout).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sa_hf.ops.engine import Gradients
from sa_hf.ops.triton.backward import key_kernel, prepare_kernel, query_kernel
from sa_hf.ops.triton.bias import bias_kernel
from sa_hf.ops.triton.configs import Launch
from sa_hf.ops.triton.forward import combine_kernel, forward_kernel
from sa_hf.ops.triton.launch import (
    PREPARED,
    Prepared,
    Shape,
    aligned,
    chunks,
    configuration,
    contiguous,
    empty_like,
    packed,
    padded_rows,
    stats_empty,
    strides,
)
from sa_hf.ops.triton.lists import TileLists, Tiling, WorkList, WorkSizes
from sa_hf.ops.triton.scores import ScoreNumbers, Scores, position_spans

COMBINE_ROWS, COMBINE_ROWS_WIDE = 16, 8  # up to head_dim 128, and beyond (16 spill on sm_80)
PREPARE_ROWS = 32


def block_forward(lists: TileLists, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Output in the query's dtype, contiguous, log-sum-exp fp32 ``[B, H, query_slots]``."""
    query, key, value = aligned(query), aligned(key), aligned(value)
    batch, heads, n_q, d = query.shape
    out, lse = empty_like(query), stats_empty(query, batch, heads, n_q)
    work, config = lists.by_query(), configuration(variant("forward", lists, scores), query)
    reps = _repeats(lists.tiling, batch, heads)
    part, part_lse = _partials(work, reps, lists.tile_q, (d, 1), lse)
    shapes = OperandShapes(Shape.of(query), Shape.of(key), value.stride())
    start = _by_query(forward_kernel, lists.tiling, work.sizes, shapes, scores.numbers, config)
    start(query, key, value, out, lse, part, part_lse, *_list_tensors(lists, work), *scores.tensors)
    _combine(work, reps, part, part_lse, out, lse, lists.tiling, by_key=False, list_heads=lists.heads, softmax=True)
    return out, lse


def block_backward(
    lists: TileLists, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    scores: Scores,
) -> Gradients:  # fmt: skip
    """Exact flash backward of a part; ``out`` and ``lse`` are the merged ones of the plan."""
    operands = backward_operands(query, key, value, out, lse, grad_out, scores)
    dq = query_gradient(lists, operands, scores)
    dk, dv, d_spans = key_gradient(lists, operands, scores)
    bias = _bias_gradient(lists, operands, scores)
    return Gradients(dq, dk, dv, bias, d_spans)


class Operands(NamedTuple):
    """What every backward kernel reads, in the kernels' order: the aligned inputs, and per row ``sum(out * grad_out)``
    and the base-2 log-sum-exp (+inf for rows without a key), fp32 ``[B, H, query_slots padded to whole tiles]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    delta: Tensor
    shift: Tensor

    @property
    def shapes(self) -> OperandShapes:
        return OperandShapes(Shape.of(self.query), Shape.of(self.key), self.value.stride(), self.grad_out.stride())


class OperandShapes(NamedTuple):
    """Of query and key the shapes, of value and (in a backward) grad_out the strides, which alone may differ."""

    query: Shape
    key: Shape
    value: tuple[int, ...]
    grad_out: tuple[int, ...] = ()

    @property
    def strides(self) -> dict[str, int]:
        return {
            **strides("q", self.query.strides), **strides("k", self.key.strides), **strides("v", self.value),
            **strides("g", self.grad_out),  # without any where there is no gradient
        }  # fmt: skip


def backward_operands(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scores: Scores
) -> Operands:  # fmt: skip
    query, key, value, out, grad_out = (aligned(x) for x in (query, key, value, out, grad_out))
    batch, heads, n_q, _ = query.shape
    padded = padded_rows(n_q)
    delta, shift = stats_empty(query, batch, heads, padded), stats_empty(query, batch, heads, padded)
    start = _prepare(Shape.of(out), grad_out.stride(), scores.query.strides)
    start(out, grad_out, packed(lse), scores.query.index, delta, shift)
    return Operands(query, key, value, grad_out, delta, shift)


@lru_cache(maxsize=PREPARED)
def _prepare(out: Shape, grad_out: tuple[int, ...], positions: tuple[int, int]) -> Prepared:
    batch, heads, n_q, d = out.sizes
    arguments = {
        **strides("o", out.strides), **strides("g", grad_out), "pqb": positions[0], "pqh": positions[1], "n_q": n_q,
        "heads": heads, "ROWS": PREPARE_ROWS, **chunks(d),
    }  # fmt: skip
    return Prepared(prepare_kernel, (padded_rows(n_q) // PREPARE_ROWS, heads, batch), arguments)


def query_gradient(lists: TileLists, operands: Operands, scores: Scores) -> Tensor:
    """dQ, in the queries' shape and dtype."""
    query = operands.query
    work, config = lists.by_query(), configuration(variant("query", lists, scores), query)
    reps = _repeats(lists.tiling, *query.shape[:2])
    dq = empty_like(query)
    (part,) = _partials(work, reps, lists.tile_q, query.shape[3:], operands.delta)
    start = _by_query(query_kernel, lists.tiling, work.sizes, operands.shapes, scores.numbers, config)
    start(*operands, dq, part, *_list_tensors(lists, work), *scores.tensors)
    _combine(work, reps, part, None, dq, None, lists.tiling, by_key=False, list_heads=lists.heads, softmax=False)
    return dq


@lru_cache(maxsize=PREPARED)
def _by_query(
    kernel: Any, tiling: Tiling, work: WorkSizes, shapes: OperandShapes, numbers: ScoreNumbers, config: Launch
) -> Prepared:  # fmt: skip
    """The forward's launch, or that of dQ: both go over the rows of queries, and write in their shape."""
    query = shapes.query
    reps = _repeats(tiling, *query.sizes[:2])
    block_q, block_k = _blocks(config, tiling.tile_q, tiling.tile_k)
    arguments = {
        **shapes.strides, **strides("o", contiguous(query.sizes)), **_sizes(tiling, query, shapes.key, reps),
        **numbers._asdict(), **_constants(tiling, query), "slots": work.slots, "query_tiles": tiling.query_tiles,
        "BLOCK_Q": block_q, "BLOCK_K": block_k, "MASKED_STAGES": masked_stages(config),
    }  # fmt: skip
    return Prepared(kernel, _grid(work, tiling.tile_q // block_q, reps), arguments, config)


def key_gradient(lists: TileLists, operands: Operands, scores: Scores) -> tuple[Tensor, Tensor, Tensor | None]:
    """dK and dV in the keys' shape and dtype, and the gradient of the spans at their positions."""
    query, key = operands.query, operands.key
    batch, heads, _, d = query.shape
    kv_heads, n_k = key.shape[1], key.shape[2]
    group = heads // kv_heads
    # The gate differs by query head, and so does its gradient: then a list is one query head's, summed afterwards.
    flat = 1 if scores.spans is not None else group
    work, config = lists.by_key(flat, group), configuration(variant("key", lists, scores), query)
    out_heads = heads // flat
    reps = _repeats(lists.tiling, batch, out_heads)
    grown = out_heads != kv_heads
    dk, dv = (stats_empty(key, batch, out_heads, n_k, d) if grown else empty_like(key) for _ in range(2))
    d_span = None if scores.spans is None else stats_empty(key, batch, out_heads, n_k)
    part_k, part_v, part_span = _partials(work, reps, lists.tile_k, (d, d, 1), operands.delta)
    start = _key(lists.tiling, work.sizes, operands.shapes, flat, scores.numbers, config)
    start(*operands, dk, dv, d_span, part_k, part_v, part_span, *_list_tensors(lists, work), *scores.tensors)
    list_heads = 1 if lists.heads == 1 else out_heads
    spans = None if d_span is None else part_span
    _combine(work, reps, part_k, spans, dk, d_span, lists.tiling, by_key=True, list_heads=list_heads, softmax=False)
    _combine(work, reps, part_v, None, dv, None, lists.tiling, by_key=True, list_heads=list_heads, softmax=False)
    if grown:
        dk, dv = (x.unflatten(1, (kv_heads, group)).sum(2).to(key.dtype) for x in (dk, dv))
    if d_span is None or scores.options.spans is None:
        return dk, dv, None
    return dk, dv, position_spans(d_span, scores.key, scores.options.spans)


@lru_cache(maxsize=PREPARED)
def _key(
    tiling: Tiling, work: WorkSizes, shapes: OperandShapes, flat: int, numbers: ScoreNumbers, config: Launch
) -> Prepared:  # fmt: skip
    query, key = shapes.query, shapes.key
    batch, heads, _, _ = query.sizes
    out = (batch, heads // flat, *key.sizes[2:])
    reps = _repeats(tiling, *out[:2])
    block_k, block_q = _blocks(config, tiling.tile_k, tiling.tile_q)
    arguments = {
        **shapes.strides, **strides("o", contiguous(out)), **_sizes(tiling, query, key, reps), **numbers._asdict(),
        **_constants(tiling, query), "list_heads": 1 if tiling.heads == 1 else out[1], "slots": work.slots,
        "flat": flat, "GROUPED": flat > 1, "query_tiles": tiling.query_tiles, "key_tiles": tiling.key_tiles,
        "BLOCK_Q": block_q, "BLOCK_K": block_k, "MASKED_STAGES": masked_stages(config),
    }  # fmt: skip
    return Prepared(key_kernel, _grid(work, tiling.tile_k // block_k, reps), arguments, config)


def _bias_gradient(lists: TileLists, operands: Operands, scores: Scores) -> Tensor | None:
    bias = scores.options.distance_bias
    if bias is None:
        return None
    table, unit = bias_table(bias, operands, scores)
    work, config = lists.by_diagonal(), configuration("bias", operands.query)
    in_line = scores.query.index is None and scores.key.index is None and lists.tile_q == lists.tile_k
    start = _bias(lists.tiling, work.sizes, operands.shapes, scores.numbers, config, in_line)
    start(*operands, table, unit, *_list_tensors(lists, work), *scores.tensors)
    return (table.double() / unit).to(bias.dtype)


@lru_cache(maxsize=PREPARED)
def _bias(
    tiling: Tiling, work: WorkSizes, shapes: OperandShapes, numbers: ScoreNumbers, config: Launch, in_line: bool
) -> Prepared:  # fmt: skip
    query = shapes.query
    reps = _repeats(tiling, *query.sizes[:2])
    block = min(config.rows, tiling.tile_q, tiling.tile_k)
    arguments = {
        **shapes.strides, **_sizes(tiling, query, shapes.key, reps), **numbers._asdict(), **_constants(tiling, query),
        "query_tiles": tiling.query_tiles, "key_tiles": tiling.key_tiles, "BLOCK": block, "ALIGNED": in_line,
    }  # fmt: skip
    subs = (tiling.tile_q // block) * (tiling.tile_k // block)
    return Prepared(bias_kernel, _grid(work, subs, reps), arguments, config)


def bias_table(bias: Tensor, operands: Operands, scores: Scores) -> tuple[Tensor, Tensor]:
    """The fixed-point accumulator, int64 zeros in bias's shape, and its unit, fp32 ``[1]``, a power of two.

    A row of probabilities sums to at most 1, so no entry passes ``sum_i (|grad_out_i| * max_j |v_j| + |delta_i|)`` (the
    product over the kept share under dropout; delta holds the values of a plan's other parts too): that bound becomes
    2**61.
    """
    norm = partial(torch.linalg.vector_norm, dim=-1, dtype=torch.float32)
    products = norm(operands.grad_out).sum() * norm(operands.value).amax() * scores.numbers.keep_scale
    bound = products + operands.delta.abs().sum()
    unit = torch.exp2(torch.floor(61.0 - torch.log2(bound.clamp(min=1e-30)))).clamp(max=2.0**100)
    return torch.zeros(bias.shape, dtype=torch.int64, device=bias.device), unit.reshape(1)


def variant(kernel: str, lists: TileLists, scores: Scores) -> str:
    """The name of a kernel in the table of launch configurations."""
    demanding = scores.demanding + (lists.ranges is not None)
    if demanding:
        return kernel + ("+" if demanding <= 2 else "++")
    return kernel + "@128" if min(lists.tile_q, lists.tile_k) >= 128 else kernel


def _repeats(tiling: Tiling, batch: int, heads: int) -> tuple[int, int]:
    """How often the lists are run: over the heads and the batch rows that share them."""
    return (heads if tiling.heads == 1 else 1), (batch if tiling.batch == 1 else 1)


def masked_stages(config: Launch) -> int:
    """Of a kernel that goes over a list. The loop over tiles with a predicate is short and loads the bits of its masks
    beside K and V: a third stage there would cost the room of a second block per processor (115,712 bytes of shared
    memory at head_dim 128, where two blocks fit up to 115,200)."""
    return min(config.stages, 2)


def _blocks(config: Launch, own_tile: int, other_tile: int) -> tuple[int, int]:
    return min(config.rows, own_tile), min(config.columns, other_tile)


def _grid(work: WorkSizes, subs: int, reps: tuple[int, int]) -> tuple[int]:
    return (work.items * subs * reps[0] * reps[1],)


def _partials(
    work: WorkList, reps: tuple[int, int], tile: int, widths: tuple[int, ...], unused: Tensor
) -> list[Tensor]:  # fmt: skip
    """fp32 buffers of the cut lists' pieces. Where nothing was cut they are neither read nor written, and ``unused``,
    any fp32 tensor, stands for them: an argument never changes its type."""
    rows = reps[0] * reps[1] * work.slots * tile
    return [stats_empty(unused, rows * width) if rows else unused for width in widths]


def _list_tensors(lists: TileLists, work: WorkList) -> tuple[Tensor | None, ...]:
    """In the kernels' order."""
    return work.items, work.entries, lists.words, lists.ranges


def _sizes(tiling: Tiling, query: Shape, key: Shape, reps: tuple[int, int]) -> dict[str, int]:
    heads = query.sizes[1]
    srb = srh = 0
    if tiling.ranges is not None:
        range_batch, range_heads, slots, columns = tiling.ranges
        srb = range_heads * slots * columns if range_batch > 1 else 0
        srh = slots * columns if range_heads > 1 else 0
    return {
        "srb": srb, "srh": srh, "n_q": query.sizes[2], "n_k": key.sizes[2], "heads": heads,
        "group": heads // key.sizes[1], "list_heads": tiling.heads, "rep_heads": reps[0], "reps": reps[0] * reps[1],
        "left": tiling.left, "right": tiling.right,
    }  # fmt: skip


def _constants(tiling: Tiling, query: Shape) -> dict[str, int | bool]:
    """Compile-time constants that the kernels share."""
    return {
        "TILE_Q": tiling.tile_q, "TILE_K": tiling.tile_k, **chunks(query.sizes[3]),
        "RANGE_COLUMNS": 2 if tiling.ranges is None else tiling.ranges[3],
        "RANGE_ON_FULL": tiling.range_on_full and tiling.ranges is not None,
    }  # fmt: skip


def _combine(
    work: WorkList, reps: tuple[int, int], part: Tensor, part_vector: Tensor | None, whole: Tensor,
    vector: Tensor | None, tiling: Tiling, *, by_key: bool, list_heads: int, softmax: bool,
) -> None:  # fmt: skip
    """Reduce the pieces of the cut lists: by log-sum-exp (``vector`` is it), or by a sum, of both."""
    if work.sizes.splits:
        tile, tiles = (tiling.tile_k, tiling.key_tiles) if by_key else (tiling.tile_q, tiling.query_tiles)
        start = _combining(work.sizes, reps, Shape.of(whole), tile, tiles, list_heads, softmax)
        start(part, part_vector, whole, vector, work.splits)


@lru_cache(maxsize=PREPARED)
def _combining(
    work: WorkSizes, reps: tuple[int, int], whole: Shape, tile: int, tiles: int, list_heads: int, softmax: bool
) -> Prepared:  # fmt: skip
    _, heads, n, d = whole.sizes
    rows = min(COMBINE_ROWS if d <= 128 else COMBINE_ROWS_WIDE, tile)
    arguments = {
        **strides("o", whole.strides), "n": n, "heads": heads, "list_heads": list_heads, "rep_heads": reps[0],
        "reps": reps[0] * reps[1], "slots": work.slots, "tiles": tiles, "TILE": tile, "ROWS": rows, **chunks(d),
        "SOFTMAX": softmax,
    }  # fmt: skip
    return Prepared(combine_kernel, (work.splits * (tile // rows) * reps[0] * reps[1],), arguments)
