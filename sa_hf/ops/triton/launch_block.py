"""Launchers of the block kernels: forward, dQ, dK/dV and the gradient of a distance table over :class:`TileLists`.

Contract: query ``[B, H, query_slots, D]``, key and value ``[B, Hk, key_slots, D]`` (``Hk`` divides H), any strides;
results as in ``ops.engine.Engine``. No host read in the steady state (the lists are kept with their layout).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
from sa_hf.ops.engine import Gradients
from sa_hf.ops.triton.backward import key_kernel, prepare_kernel, query_kernel
from sa_hf.ops.triton.bias import bias_kernel
from sa_hf.ops.triton.common import STATS_TILE
from sa_hf.ops.triton.configs import Launch
from sa_hf.ops.triton.forward import combine_kernel, forward_kernel
from sa_hf.ops.triton.launch import (
    aligned,
    build_options,
    chunks,
    configuration,
    empty_like,
    packed,
    stats_empty,
    strides,
)
from sa_hf.ops.triton.lists import TileLists, WorkList
from sa_hf.ops.triton.scores import Scores, position_spans

COMBINE_ROWS, COMBINE_ROWS_WIDE = 16, 8  # up to head_dim 128, and beyond (16 spill on sm_80)
PREPARE_ROWS = 32


def block_forward(lists: TileLists, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Output in the query's dtype, contiguous, log-sum-exp fp32 ``[B, H, query_slots]``."""
    query, key, value = aligned(query), aligned(key), aligned(value)
    batch, heads, n_q, d = query.shape
    out, lse = empty_like(query), stats_empty(query, batch, heads, n_q)
    work, config = lists.by_query(), configuration(variant("forward", lists, scores), query)
    reps = _repeats(lists, batch, heads)
    part, part_lse = _partials(work, reps, lists.tile_q, (d, 1), query)
    block_q, block_k = _blocks(config, lists.tile_q, lists.tile_k)
    forward_kernel[_grid(work, lists.tile_q // block_q, reps)](
        query, key, value, out, lse, part, part_lse, **_list_pointers(lists, work), **scores.pointers,
        **strides("q", query), **strides("k", key), **strides("v", value), **strides("o", out),
        **_sizes(lists, query, key, reps), **scores.scalars, slots=work.slots, query_tiles=lists.query_tiles,
        TILE_Q=lists.tile_q, TILE_K=lists.tile_k, BLOCK_Q=block_q, BLOCK_K=block_k, **chunks(d),
        **_flags(lists, scores), **loop_options(config),
    )  # fmt: skip
    _combine(
        work, reps, part, part_lse, out, lse, lists.tile_q, lists.query_tiles, list_heads=lists.heads, softmax=True
    )
    return out, lse


def block_backward(
    lists: TileLists,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scores: Scores,
) -> Gradients:
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
    def strides(self) -> dict[str, int]:
        return {
            **strides("q", self.query), **strides("k", self.key), **strides("v", self.value),
            **strides("g", self.grad_out),
        }  # fmt: skip


def backward_operands(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scores: Scores
) -> Operands:  # fmt: skip
    query, key, value, out, grad_out = (aligned(x) for x in (query, key, value, out, grad_out))
    batch, heads, n_q, d = query.shape
    padded = triton.cdiv(n_q, STATS_TILE.value) * STATS_TILE.value
    delta, shift = (stats_empty(query, batch, heads, padded) for _ in range(2))
    pqb, pqh = scores.query.strides
    prepare_kernel[padded // PREPARE_ROWS, heads, batch](
        out, grad_out, packed(lse), scores.query.index, delta, shift, **strides("o", out), **strides("g", grad_out),
        pqb=pqb, pqh=pqh, n_q=n_q, heads=heads, ROWS=PREPARE_ROWS, **chunks(d), **build_options(),
    )  # fmt: skip
    return Operands(query, key, value, grad_out, delta, shift)


def query_gradient(lists: TileLists, operands: Operands, scores: Scores) -> Tensor:
    """dQ, in the queries' shape and dtype."""
    query, key = operands.query, operands.key
    batch, heads, _, d = query.shape
    work, config = lists.by_query(), configuration(variant("query", lists, scores), query)
    reps = _repeats(lists, batch, heads)
    dq = empty_like(query)
    (part,) = _partials(work, reps, lists.tile_q, (d,), query)
    block_q, block_k = _blocks(config, lists.tile_q, lists.tile_k)
    query_kernel[_grid(work, lists.tile_q // block_q, reps)](
        *operands, dq, part, **_list_pointers(lists, work), **scores.pointers, **operands.strides, **strides("o", dq),
        **_sizes(lists, query, key, reps), **scores.scalars, slots=work.slots, query_tiles=lists.query_tiles,
        TILE_Q=lists.tile_q, TILE_K=lists.tile_k, BLOCK_Q=block_q, BLOCK_K=block_k, **chunks(d),
        **_flags(lists, scores), **loop_options(config),
    )  # fmt: skip
    _combine(work, reps, part, None, dq, None, lists.tile_q, lists.query_tiles, list_heads=lists.heads, softmax=False)
    return dq


def key_gradient(
    lists: TileLists, operands: Operands, scores: Scores
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dK and dV in the keys' shape and dtype, and the gradient of the spans at their positions."""
    query, key = operands.query, operands.key
    batch, heads, _, d = query.shape
    kv_heads, n_k = key.shape[1], key.shape[2]
    group = heads // kv_heads
    # The gate differs by query head, and so does its gradient: then a list is one query head's, summed afterwards.
    flat = 1 if scores.spans is not None else group
    work, config = lists.by_key(flat, group), configuration(variant("key", lists, scores), query)
    out_heads = heads // flat
    rep_heads, rep_batch = (out_heads if lists.heads == 1 else 1), (batch if lists.batch == 1 else 1)
    reps = (rep_heads, rep_batch)
    grown = out_heads != kv_heads
    dk, dv = (
        stats_empty(key, batch, out_heads, n_k, d) if grown else empty_like(key) for _ in range(2)
    )  # fmt: skip
    d_span = None if scores.spans is None else stats_empty(key, batch, out_heads, n_k)
    part_k, part_v, part_span = _partials(work, reps, lists.tile_k, (d, d, 1), key)
    block_k, block_q = _blocks(config, lists.tile_k, lists.tile_q)
    sizes = _sizes(lists, query, key, reps) | {"list_heads": 1 if lists.heads == 1 else out_heads}
    key_kernel[_grid(work, lists.tile_k // block_k, reps)](
        *operands, dk, dv, d_span, part_k, part_v, part_span, **_list_pointers(lists, work), **scores.pointers,
        **operands.strides, **strides("o", dk),
        **sizes, **scores.scalars, slots=work.slots, flat=flat,
        query_tiles=lists.query_tiles, key_tiles=lists.key_tiles,
        TILE_Q=lists.tile_q, TILE_K=lists.tile_k, BLOCK_Q=block_q, BLOCK_K=block_k, **chunks(d),
        **_flags(lists, scores), GROUPED=flat > 1, **loop_options(config),
    )  # fmt: skip
    tiles = lists.tile_k, lists.key_tiles
    spans = None if d_span is None else part_span
    _combine(work, reps, part_k, spans, dk, d_span, *tiles, list_heads=sizes["list_heads"], softmax=False)
    _combine(work, reps, part_v, None, dv, None, *tiles, list_heads=sizes["list_heads"], softmax=False)
    if grown:
        dk, dv = (x.unflatten(1, (kv_heads, group)).sum(2).to(key.dtype) for x in (dk, dv))
    if d_span is None or scores.options.spans is None:
        return dk, dv, None
    return dk, dv, position_spans(d_span, scores.key, scores.options.spans)


def _bias_gradient(lists: TileLists, operands: Operands, scores: Scores) -> Tensor | None:
    bias = scores.options.distance_bias
    if bias is None:
        return None
    query, key = operands.query, operands.key
    batch, heads, _, d = query.shape
    table, unit = bias_table(bias, operands, scores)
    work, config = lists.by_diagonal(), configuration("bias", query)
    reps = _repeats(lists, batch, heads)
    aligned_slots = scores.query.index is None and scores.key.index is None and lists.tile_q == lists.tile_k
    block = min(config.rows, lists.tile_q, lists.tile_k)
    bias_kernel[_grid(work, (lists.tile_q // block) * (lists.tile_k // block), reps)](
        *operands, table, unit, **_list_pointers(lists, work), **scores.pointers, **operands.strides,
        **_sizes(lists, query, key, reps), **scores.scalars, query_tiles=lists.query_tiles, key_tiles=lists.key_tiles,
        TILE_Q=lists.tile_q, TILE_K=lists.tile_k, BLOCK=block, **chunks(d), **_flags(lists, scores),
        ALIGNED=aligned_slots,
        **build_options(config),
    )  # fmt: skip
    return (table.double() / unit).to(bias.dtype)


def bias_table(bias: Tensor, operands: Operands, scores: Scores) -> tuple[Tensor, Tensor]:
    """The fixed-point accumulator, int64 zeros in bias's shape, and its unit, fp32 ``[1]``, a power of two.

    A row of probabilities sums to at most 1, so no entry passes ``sum_i (|grad_out_i| * max_j |v_j| + |delta_i|)`` (the
    product over the kept share under dropout; delta holds the values of a plan's other parts too): that bound becomes
    2**61.
    """
    norm = partial(torch.linalg.vector_norm, dim=-1, dtype=torch.float32)
    products = norm(operands.grad_out).sum() * norm(operands.value).amax() * scores.scalars["keep_scale"]
    bound = products + operands.delta.abs().sum()
    unit = torch.exp2(torch.floor(61.0 - torch.log2(bound.clamp(min=1e-30)))).clamp(max=2.0**100)
    return torch.zeros(bias.shape, dtype=torch.int64, device=bias.device), unit.reshape(1)


def variant(kernel: str, lists: TileLists, scores: Scores) -> str:
    """The name of a kernel in the table of launch configurations."""
    demanding = scores.demanding + (lists.ranges is not None)
    if demanding:
        return kernel + ("+" if demanding <= 2 else "++")
    return kernel + "@128" if min(lists.tile_q, lists.tile_k) >= 128 else kernel


def _repeats(lists: TileLists, batch: int, heads: int) -> tuple[int, int]:
    """How often the lists are run: over the heads and the batch rows that share them."""
    return (heads if lists.heads == 1 else 1), (batch if lists.batch == 1 else 1)


def loop_options(config: Launch) -> dict[str, int | bool]:
    """Compiler options of a kernel that goes over a list. The loop over tiles with a predicate is short and loads the
    bits of its masks beside K and V: a third stage there would cost the room of a second block per processor (115,712
    bytes of shared memory at head_dim 128, where two blocks fit up to 115,200)."""
    return {"MASKED_STAGES": min(config.stages, 2), **build_options(config)}


def _blocks(config: Launch, own_tile: int, other_tile: int) -> tuple[int, int]:
    return min(config.rows, own_tile), min(config.columns, other_tile)


def _grid(work: WorkList, subs: int, reps: tuple[int, int]) -> tuple[int]:
    return (len(work.items) * subs * reps[0] * reps[1],)


def _partials(work: WorkList, reps: tuple[int, int], tile: int, widths: tuple[int, ...], like: Tensor) -> list[Tensor]:
    """fp32 buffers of the cut lists' pieces; one element where nothing was cut (an argument never changes its type)."""
    rows = reps[0] * reps[1] * work.slots * tile
    return [stats_empty(like, max(rows * width, 1)) for width in widths]


def _list_pointers(lists: TileLists, work: WorkList) -> dict[str, Tensor | None]:
    return {
        "items_ptr": work.items, "entries_ptr": work.entries, "words_ptr": lists.words,
        "range_ptr": lists.ranges,
    }  # fmt: skip


def _sizes(lists: TileLists, query: Tensor, key: Tensor, reps: tuple[int, int]) -> dict[str, int]:
    heads = query.shape[1]
    srb = srh = 0
    if lists.ranges is not None:
        range_batch, range_heads, slots, columns = lists.ranges.shape
        srb = range_heads * slots * columns if range_batch > 1 else 0
        srh = slots * columns if range_heads > 1 else 0
    return {
        "srb": srb, "srh": srh, "n_q": query.shape[2], "n_k": key.shape[2], "heads": heads,
        "group": heads // key.shape[1], "list_heads": lists.heads, "rep_heads": reps[0], "reps": reps[0] * reps[1],
        "left": lists.left, "right": lists.right,
    }  # fmt: skip


def _flags(lists: TileLists, scores: Scores) -> dict[str, Any]:
    return {
        "SOFTCAP": scores.softcapped, "RANGE_COLUMNS": 2 if lists.ranges is None else lists.ranges.shape[3],
        "RANGE_ON_FULL": lists.range_on_full and lists.ranges is not None,
    }  # fmt: skip


def _combine(
    work: WorkList, reps: tuple[int, int], part: Tensor, part_vector: Tensor | None, whole: Tensor,
    vector: Tensor | None, tile: int, tiles: int, *, list_heads: int, softmax: bool,
) -> None:  # fmt: skip
    """Reduce the pieces of the cut lists: by log-sum-exp (``vector`` is it), or by a sum, of both."""
    if not len(work.splits):
        return
    rows = min(COMBINE_ROWS if whole.shape[3] <= 128 else COMBINE_ROWS_WIDE, tile)
    combine_kernel[(len(work.splits) * (tile // rows) * reps[0] * reps[1],)](
        part, part_vector, whole, vector, work.splits, **strides("o", whole), n=whole.shape[2], heads=whole.shape[1],
        list_heads=list_heads, rep_heads=reps[0], reps=reps[0] * reps[1], slots=work.slots, tiles=tiles,
        TILE=tile, ROWS=rows, **chunks(whole.shape[3]), SOFTMAX=softmax, **build_options(),
    )  # fmt: skip
