"""Steps of decoding that the C++ kernel takes: when, and what their rows read."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from sa_hf.layer import AttentionInputs
from sa_hf.ops.cpp.steps import Labelled, Listed, prepared
from sa_hf.ops.decode import runs_in_place
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.reads import Reads, Row, RunLists
from sa_hf.ops.sequences import Sequences

# Up to this many new queries read their keys by lists of positions; above it (prefill in chunks) a plan is cheaper.
DECODE_QUERIES = 16
EVERYTHING = RunLists.of([[(0, 2**40, 1)]])


def is_step(inputs: AttentionInputs) -> bool:
    """Whether a few new queries meet a cache: each then reads its own keys and no others."""
    new, held = inputs.query.shape[2], inputs.sequences.key_length
    if not inputs.causal or new == held or new > DECODE_QUERIES or inputs.dropout > 0:
        return False
    if inputs.query_term is not None or inputs.key_term is not None:  # which no kernel for decoding has
        return False
    # Distances there are between slots, which zeros inside a mask and dropped keys set apart from positions.
    moved = inputs.sequences.key_gather is not None or inputs.key_slots is not None
    return not (moved and inputs.distance_bias is not None)


def is_step_in_place(inputs: AttentionInputs, *state: Tensor | None) -> bool:
    """Whether the C++ kernel takes this call; ``state`` is what a pattern has learned."""
    if not is_step(inputs):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in state):
        return False
    options = ScoreOptions(inputs.scale, distance_bias=inputs.distance_bias, sinks=inputs.sinks)
    return runs_in_place(inputs.query, inputs.key, inputs.value, options, inputs.engine)


def run_step(
    inputs: AttentionInputs, reads: Reads, options: ScoreOptions, *, listed: Listed | None = None,
    labelled: Labelled | None = None,
) -> Tensor:  # fmt: skip
    """A step that :func:`is_step_in_place`, ``[B, H, Nq, Dv]``; what it has settled stays on the call, for later layers
    (``SparseAttention.repeated``). The arguments of ``decode_step``."""
    tensors = inputs.query, inputs.key, inputs.value
    step = inputs.step = prepared(*tensors, reads, options, listed=listed, labelled=labelled)
    return step.run(*tensors, inputs.key_slots).transpose(1, 2)


def step_rows(sequences: Sequences, left: int | None, chunk: int | None = None) -> list[Row]:
    """The new queries of causal sequences, each with the positions up to ``left`` behind it in the model's chunk."""
    rows = []
    for span in sequences.spans:
        first = span.key_length - span.query_length
        for new in range(span.query_length):
            position, query = first + new, span.query_start + new
            if sequences.query_gather is not None:
                query = int(sequences.query_gather[span.row, query])
            low = 0 if left is None else max(0, position - left)
            low = low if chunk is None else max(low, position // chunk * chunk)
            rows.append(Row(span.row, query, 0, span.key_start, position, low, position + 1))
    return rows


def step_reads(
    sequences: Sequences, left: int | None, lists: Callable[[int], RunLists], *, relative: bool = False,
    skip_own: bool = False, own_if_empty: bool = False, chunk: int | None = None,
) -> Reads:  # fmt: skip
    """What the new queries read: ``lists`` of their positions, within ``left`` and the model's ``chunk``."""
    rows = [(row, lists(row.position)) for row in step_rows(sequences, left, chunk)]
    order = None if sequences.key_gather is None else sequences.key_gather.cpu()
    queries = sequences.batch_size * sequences.query_length
    return Reads.of(rows, queries, relative=relative, skip_own=skip_own, own_if_empty=own_if_empty, order=order)


# The layers of a step share what they read.
@lru_cache(maxsize=64)
def shared_reads(
    sequences: Sequences, left: int | None, lists: RunLists = EVERYTHING, *, relative: bool = False,
    own_if_empty: bool = False,
) -> Reads:  # fmt: skip
    """What the new queries read by one list, within ``left``."""
    return step_reads(sequences, left, lambda _: lists, relative=relative, own_if_empty=own_if_empty)


def nearest_reach(*reaches: int | None) -> int | None:
    """The tighter of some limits; None is none."""
    given = [reach for reach in reaches if reach is not None]
    return min(given, default=None)
