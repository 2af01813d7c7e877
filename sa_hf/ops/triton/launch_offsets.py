"""Launchers of the fixed-offset kernels.

Contract: query ``[B, H, length, D]``, key and value ``[B, Hk, length, D]`` (``Hk`` divides H), any strides; results as
in ``ops.engine.Engine``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sa_hf.ops.engine import Gradients
from sa_hf.ops.graphs import hold, settled
from sa_hf.ops.parts import OffsetsPart
from sa_hf.ops.triton.configs import Launch
from sa_hf.ops.triton.launch import (
    PREPARED,
    Prepared,
    Shape,
    aligned,
    chunks,
    configuration,
    contiguous,
    empty_like,
    stats_empty,
    strides,
)
from sa_hf.ops.triton.launch_block import OperandShapes, backward_operands, bias_table
from sa_hf.ops.triton.offsets import offsets_forward_kernel, offsets_key_kernel, offsets_query_kernel
from sa_hf.ops.triton.scores import ScoreNumbers, Scores, position_spans


def offsets_forward(
    part: OffsetsPart, query: Tensor, key: Tensor, value: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Output in the query's dtype, contiguous, log-sum-exp fp32 ``[B, H, length]``."""
    query, key, value = aligned(query), aligned(key), aligned(value)
    batch, heads, n, _ = query.shape
    out, lse = empty_like(query), stats_empty(query, batch, heads, n)
    table = _held_table(part, query)
    shapes = OperandShapes(Shape.of(query), Shape.of(key), value.stride())
    start = _launch(
        offsets_forward_kernel, shapes.query.sizes, _numbers(part, table), shapes, scores.numbers,
        configuration("offsets", query),
    )  # fmt: skip
    start(query, key, value, out, lse, *table, *scores.tensors)
    return out, lse


def offsets_backward(
    part: OffsetsPart, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    scores: Scores,
) -> Gradients:  # fmt: skip
    """As ``launch_block.block_backward``."""
    operands = backward_operands(query, key, value, out, lse, grad_out, scores)
    query, key = operands.query, operands.key
    options = scores.options
    table = unit = d_span = None
    if options.distance_bias is not None:
        table, unit = bias_table(options.distance_bias, operands, scores)
    if options.spans is not None:
        d_span = stats_empty(query, *query.shape[:3])
    dq, dk, dv = empty_like(query), empty_like(key), empty_like(key)
    offsets = _held_table(part, query)
    shared = _numbers(part, offsets), operands.shapes, scores.numbers
    start = _launch(offsets_query_kernel, query.shape, *shared, configuration("offsets_query", query))
    start(*operands, dq, table, unit, *offsets, *scores.tensors)
    config = configuration("offsets_key" + ("++" if scores.demanding > 2 else ""), query)
    start = _launch(offsets_key_kernel, key.shape, *shared, config)
    start(*operands, dk, dv, d_span, *offsets, *scores.tensors)
    bias = spans = None
    if options.distance_bias is not None and table is not None and unit is not None:
        bias = (table.double() / unit).to(options.distance_bias.dtype)
    if options.spans is not None and d_span is not None:
        spans = position_spans(d_span, scores.key, options.spans)
    return Gradients(dq, dk, dv, bias, spans)


@lru_cache(maxsize=PREPARED)
def _launch(
    kernel: Any, of: tuple[int, ...], part: PartNumbers, shapes: OperandShapes, numbers: ScoreNumbers, config: Launch
) -> Prepared:  # fmt: skip
    """Args: of: the sizes of what is written, whose rows the programs own: queries or keys."""
    batch, heads, n, _ = of
    arguments = {
        **shapes.strides, **strides("o", contiguous(of)), **_arguments(part, shapes.query, shapes.key),
        **numbers._asdict(), "ROWS": config.rows,
    }  # fmt: skip
    return Prepared(kernel, (triton.cdiv(n, config.rows), heads, batch), arguments, config)


class PartNumbers(NamedTuple):
    """Kernel arguments by name: an :class:`OffsetsPart` in numbers, and the sizes of its table."""

    n: int
    begin: int
    stop: int
    most: int
    list_stride: int


def _numbers(part: OffsetsPart, table: tuple[Tensor, Tensor]) -> PartNumbers:
    return PartNumbers(
        part.length, part.begin, min(part.stop, part.length), table[0].shape[1], int(len(part.offsets) > 1)
    )  # fmt: skip


def _arguments(part: PartNumbers, query: Shape, key: Shape) -> dict[str, int]:
    heads = query.sizes[1]
    return {**part._asdict(), "heads": heads, "group": heads // key.sizes[1], **chunks(query.sizes[3])}


def _held_table(part: OffsetsPart, query: Tensor) -> tuple[Tensor, Tensor]:
    table = _table(part.offsets, query.device)
    hold(query, table)
    return table


@lru_cache(maxsize=256)
def _table(offsets: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 ``[lists, most]`` padded with 0, and int32 ``[lists]`` counts."""
    most = max(1, *(len(row) for row in offsets))
    table = torch.tensor([[*row, *[0] * (most - len(row))] for row in offsets], dtype=torch.int32)
    counts = torch.tensor([len(row) for row in offsets], dtype=torch.int32)
    return table.to(device), settled(counts.to(device))
