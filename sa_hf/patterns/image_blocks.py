"""Pairs that a model adds to what a layer reads: tokens of one image (or prefix) read each other, forward too.

The rows of these tokens, few beside a long text, are computed anew, densely: over the pattern's pairs and the block's,
each pair of both as often as the pattern has it. Memory is that of ``heads x rows x keys`` scores.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.layer import AttentionInputs, Blocks, Geometry
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.sequences import Span
from sa_hf.patterns.base import StaticPatternConfig

# Scores computed at once: 2**26 in fp32 are 256 MB.
IMAGE_SCORES_AT_ONCE = 2**26


def with_blocks(
    out: Tensor, inputs: AttentionInputs, config: StaticPatternConfig, at: Geometry, options: ScoreOptions
) -> Tensor:
    """``out [B, H, Nq, Dv]`` of the pattern, with the rows of the tokens in ``inputs.blocks`` over their block, too.

    Args: at: the layer, of any length.
    """
    if inputs.blocks is None:
        return out
    if options.distance_bias is not None or options.terms != (None, None):
        raise SparseAttentionError(
            "the pairs of an image's tokens cannot be added beside a position bias; keep such layers dense"
        )
    found = [_rows_of(span, inputs, inputs.blocks, config, at, options) for span in inputs.sequences.spans]
    kept = [one for one in found if one is not None]
    if not kept:
        return out
    rows, slots, values = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return out.transpose(1, 2).index_put((rows, slots), values.to(out.dtype)).transpose(1, 2)


def _rows_of(
    span: Span, inputs: AttentionInputs, blocks: Blocks, config: StaticPatternConfig, at: Geometry,
    options: ScoreOptions,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Of one sequence: the batch rows and query slots ``[rows]`` of tokens in blocks, and their outputs ``[rows, H,
    Dv]``."""
    device, sequences = inputs.query.device, inputs.sequences
    keys = torch.arange(span.key_start, span.key_start + span.key_length, device=device)
    queries = torch.arange(span.query_start, span.query_start + span.query_length, device=device)
    if sequences.key_gather is not None and sequences.query_gather is not None:
        keys, queries = sequences.key_gather[span.row][keys], sequences.query_gather[span.row][queries]
    ids = blocks.ids[span.row if len(blocks.ids) > 1 else 0].to(device)[keys]
    first = span.key_length - span.query_length
    positions = first + torch.nonzero(ids[first:] >= 0).flatten()
    if not len(positions):
        return None
    slots = queries[positions - first]
    geometry = replace(at, key_length=span.key_length, query_length=span.query_length)
    group = inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (x[span.row][:, keys].repeat_interleave(group, 0) for x in (inputs.key, inputs.value))
    query = inputs.query[span.row][:, slots]
    step = max(1, IMAGE_SCORES_AT_ONCE // (query.shape[0] * span.key_length))
    values = [
        _attend(query[:, rows], key, value, _times(config, geometry, positions[rows], ids, blocks), options)
        for rows in (slice(start, start + step) for start in range(0, len(positions), step))
    ]
    return torch.full_like(slots, span.row), slots, torch.cat(values, 1).transpose(0, 1)


def _times(config: StaticPatternConfig, geometry: Geometry, positions: Tensor, ids: Tensor, blocks: Blocks) -> Tensor:
    """How often each of the rows at ``positions`` reads each key, int64 ``[H, rows, keys]``."""
    device = positions.device
    head = torch.tensor(geometry.heads, device=device)[:, None, None]
    i, j = positions[None, :, None], torch.arange(geometry.key_length, device=device)[None, None, :]
    times = torch.zeros(len(geometry.heads), len(positions), geometry.key_length, dtype=torch.int64, device=device)
    for branch in config.branches(geometry):
        times += (branch(head, i, j) & geometry.reached(i, j)).long()
    if config.drop_diagonal:  # every row here has its block, so none is without keys
        times = times.where(i != j, 0)
    same = (ids[positions][None, :, None] == ids[None, None, :]) & blocks.band.contains(i, j)
    return times.where(~same | (times > 0), 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, times: Tensor, options: ScoreOptions) -> Tensor:
    """``[H, rows, Dv]``: the softmax over each key as often as ``times`` says."""
    scores = (query @ key.transpose(1, 2)).to(torch.promote_types(query.dtype, torch.float32)) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores + times.to(scores.dtype).log()
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = torch.nn.functional.dropout(weights.to(value.dtype), options.dropout)
    return weights @ value
