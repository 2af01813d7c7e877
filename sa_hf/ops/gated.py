"""Dense attention under a learned gate, row chunk by row chunk: the search phase of SparseBERT.

``p_ij ∝ gate_ij * exp(score_ij)``. A dropped key (gate 0) still receives a gradient through its gate, so no tile may be
skipped here and the cost is dense; the memory is not: a chunk of rows at a time, recomputed in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sa_hf.ops.grouped import Group
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.random import dropout_factor
from sa_hf.ops.sinks import with_sinks

# Scores held at once, over all heads: 2**23 fp32 are 32 MB per temporary.
SCORES_AT_ONCE = 2**23
# exp(80) is finite in fp32: bounds the gradient of a dropped key that scores far above the kept ones.
MAX_EXPONENT = 80.0

# (first position, end position) of a chunk of query rows -> gate [H, rows, key_length], 0 where not allowed
GateRows = Callable[[int, int], Tensor]


def gated_attention(group: Group, gate_rows: GateRows, parameters: tuple[Tensor, ...]) -> Tensor:
    """Gated attention of a group, ``[G, H, nq, D]``.

    Args:
        gate_rows: the gate of a chunk of rows, differentiable in ``parameters``; in a row without any gate the own
            key counts with 1.
        parameters: the tensors that ``gate_rows`` reads and that need a gradient.
    """
    sequences, heads, n_q, _ = group.query.shape
    n_k, offset = group.key.shape[2], group.query_offset
    rows = max(16, SCORES_AT_ONCE // (sequences * heads * n_k))
    if rows >= n_q:
        return _chunk(group.query, group.key, group.value, gate_rows(offset, n_k), group.options, offset)

    def one(begin: int, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
        gate = gate_rows(begin, begin + query.shape[2])
        return _chunk(query, key, value, gate, group.options, begin)

    outs = []
    for begin in range(0, n_q, rows):
        query = group.query[:, :, begin : begin + rows]
        rows_of_chunk = partial(one, begin + offset)
        args = (query, group.key, group.value, *parameters)
        if torch.is_grad_enabled():
            outs.append(checkpoint(rows_of_chunk, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(rows_of_chunk(*args))
    return torch.cat(outs, dim=2)


def _chunk(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, options: ScoreOptions, begin: int) -> Tensor:
    """Rows ``begin, begin + 1, ...`` (positions): query ``[G, H, rows, D]``, gate ``[H, rows, nk]``."""
    stats = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, kv_heads, n_k = query.shape[1], key.shape[1], key.shape[2]
    i = torch.arange(begin, begin + query.shape[2], device=query.device)[:, None]
    j = torch.arange(n_k, device=query.device)[None, :]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).to(stats) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.distance_bias is not None:
        scores = scores + rows_by_distance(options.distance_bias.to(stats), begin, begin + query.shape[2], n_k)
    gate = gate.to(stats)
    lonely = (gate.detach() == 0).all(-1, keepdim=True)
    gate = gate + (lonely & (i == j)).to(stats)
    kept = gate.detach() > 0
    peak = scores.detach().masked_fill(~kept, -torch.inf).amax(-1, keepdim=True)
    weight = gate * torch.exp((scores - peak).clamp(max=MAX_EXPONENT))
    total = weight.sum(-1, keepdim=True)
    probability = weight / total
    if options.dropout > 0:
        probability = probability * dropout_factor(options, len(query), heads, i, j)
    grouped = probability.to(value.dtype).unflatten(1, (kv_heads, heads // kv_heads))
    out: Tensor = (grouped @ value.unsqueeze(2)).flatten(1, 2)
    return with_sinks(out, (torch.log(total) + peak).squeeze(-1), options.sinks)[0]


def rows_by_distance(table: Tensor, begin: int, end: int, key_length: int) -> Tensor:
    """``[H, end - begin, key_length]``: a table ``[H, 2 * key_length - 1]`` by ``j - i + key_length - 1``, at the query
    positions ``begin <= i < end`` and every key position j. Views, whose gradient sums each diagonal in one order."""
    # Row i is the window of the table that starts at key_length - 1 - i: a run of windows, last row first.
    run = table[:, key_length - end : 2 * key_length - 1 - begin]
    return run.unfold(1, key_length, 1).flip(1)
