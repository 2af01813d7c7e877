"""Launchers of the fixed-offset kernels.

Contract: query ``[B, H, length, D]``, key and value ``[B, Hk, length, D]`` (``Hk`` divides H), any strides; results as
in ``ops.engine.Engine``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import triton
from sa_hf.ops.engine import Gradients
from sa_hf.ops.graphs import hold, settled
from sa_hf.ops.parts import OffsetsPart
from sa_hf.ops.triton.launch import aligned, build_options, chunks, configuration, empty_like, stats_empty, strides
from sa_hf.ops.triton.launch_block import backward_operands, bias_table
from sa_hf.ops.triton.offsets import offsets_forward_kernel, offsets_key_kernel, offsets_query_kernel
from sa_hf.ops.triton.scores import Scores, position_spans


def offsets_forward(
    part: OffsetsPart, query: Tensor, key: Tensor, value: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Output in the query's dtype, contiguous, log-sum-exp fp32 ``[B, H, length]``."""
    query, key, value = aligned(query), aligned(key), aligned(value)
    batch, heads, n, d = query.shape
    out, lse = empty_like(query), stats_empty(query, batch, heads, n)
    config = configuration("offsets", query)
    offsets_forward_kernel[triton.cdiv(n, config.rows), heads, batch](
        query, key, value, out, lse, **scores.pointers, **_arguments(part, query, key, scores),
        **strides("q", query), **strides("k", key), **strides("v", value), **strides("o", out),
        ROWS=config.rows, **chunks(d), SOFTCAP=scores.softcapped, **build_options(config),
    )  # fmt: skip
    return out, lse


def offsets_backward(
    part: OffsetsPart,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scores: Scores,
) -> Gradients:
    """As ``launch_block.block_backward``."""
    operands = backward_operands(query, key, value, out, lse, grad_out, scores)
    query, key = operands.query, operands.key
    batch, heads, n, _ = query.shape
    options = scores.options
    table = unit = d_span = None
    if options.distance_bias is not None:
        table, unit = bias_table(options.distance_bias, operands, scores)
    if options.spans is not None:
        d_span = stats_empty(query, batch, heads, n)
    dq, dk, dv = empty_like(query), empty_like(key), empty_like(key)
    shared = {
        **scores.pointers, **_arguments(part, query, key, scores), **operands.strides, **chunks(query.shape[3]),
        "SOFTCAP": scores.softcapped,
    }  # fmt: skip
    config = configuration("offsets_query", query)
    offsets_query_kernel[triton.cdiv(n, config.rows), heads, batch](
        *operands, dq, table, unit, **shared, **strides("o", dq),
        ROWS=config.rows, **build_options(config),
    )  # fmt: skip
    config = configuration("offsets_key" + ("++" if scores.demanding > 2 else ""), query)
    offsets_key_kernel[triton.cdiv(n, config.rows), key.shape[1], batch](
        *operands, dk, dv, d_span, **shared, **strides("o", dk),
        ROWS=config.rows, **build_options(config),
    )  # fmt: skip
    bias = spans = None
    if options.distance_bias is not None and table is not None and unit is not None:
        bias = (table.double() / unit).to(options.distance_bias.dtype)
    if options.spans is not None and d_span is not None:
        spans = position_spans(d_span, scores.key, options.spans)
    return Gradients(dq, dk, dv, bias, spans)


def _arguments(part: OffsetsPart, query: Tensor, key: Tensor, scores: Scores) -> dict[str, Any]:
    offsets, counts = table = _table(part.offsets, query.device)
    hold(query, table)
    heads = query.shape[1]
    return {
        **scores.scalars, "offsets_ptr": offsets, "counts_ptr": counts, "n": part.length, "heads": heads,
        "group": heads // key.shape[1], "most": offsets.shape[1], "list_stride": int(len(part.offsets) > 1),
        "begin": part.begin, "stop": min(part.stop, part.length),
    }  # fmt: skip


@lru_cache(maxsize=256)
def _table(offsets: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 ``[lists, most]`` padded with 0, and int32 ``[lists]`` counts."""
    most = max(1, *(len(row) for row in offsets))
    table = torch.tensor([[*row, *[0] * (most - len(row))] for row in offsets], dtype=torch.int32)
    counts = torch.tensor([len(row) for row in offsets], dtype=torch.int32)
    return table.to(device), settled(counts.to(device))
