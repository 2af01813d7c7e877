"""Keys and values at their slots, whatever a cache hands out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import placed
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.state.layers import leaves
from sa_hf.layer import AttentionInputs
from sa_hf.ops.parts import Band
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.static import StaticSparseAttention


def give_keys(child: SparseAttention, inputs: AttentionInputs, request: MaskRequest | None) -> None:
    """Set the keys and values of a call as its pattern reads them: where they lie, if that reads a step's keys by
    their slots, else each at its slot."""
    length = inputs.sequences.key_length
    first = 0 if request is None or inputs.key_slots is not None else request.key_offset
    if first and not inputs.sequences.extra_tokens:
        slots = torch.arange(first, min(first + inputs.key.shape[2], length))
        if len(slots) and slots[-1] == length - 1 and _reads_by_slot(child, replace(inputs, key_slots=slots)):
            inputs.key, inputs.value = (x[:, :, : len(slots)] for x in (inputs.key, inputs.value))
            inputs.key_slots = slots
            return
    if inputs.key_slots is None or not child.reads_listed_keys(inputs):
        inputs.key, inputs.value = absolute_keys(inputs.key, inputs.value, length, request, inputs.key_slots)
        inputs.key_slots = None


def _reads_by_slot(child: SparseAttention, inputs: AttentionInputs) -> bool:
    """Whether a sliding cache's keys can be read where they lie: a learned pattern's own state is of every token."""
    static = all(isinstance(leaf, StaticSparseAttention) for leaf in leaves(child))
    return static and child.reads_listed_keys(inputs)


def absolute_keys(
    key: Tensor, value: Tensor, length: int, request: MaskRequest | None, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[batch, key heads, length, head_dim]`` with key ``j`` at slot ``j``, whatever the cache hands
    out (the keys at ``slots``, where a sparse cache dropped others).

    A static cache hands out its whole capacity, a sliding one only the last keys: the keys that it dropped, which the
    model's own window excludes (:func:`check_reach`), come back as zeros and are never read.
    """
    held = key.shape[2]
    if slots is not None:
        return placed(key, slots, length, dim=2), placed(value, slots, length, dim=2)
    first = 0 if request is None else request.key_offset
    if first:
        key, value = (nn.functional.pad(x, (0, 0, first, 0)) for x in (key, value))
        held += first
    if held < length:
        raise SparseAttentionError(
            f"the cache handed out {held} keys for {length} positions; this cache is not supported"
        )
    return key[:, :, :length], value[:, :, :length]


def check_reach(request: MaskRequest, sequences: Sequences, band: Band) -> None:
    """That the model's own window ends before the keys that its sliding cache has dropped.

    The cache drops by slot, the window counts tokens: with zeros inside a mask the window reaches further back.

    Raises:
        SparseAttentionError: a query may read a key that is gone.
    """
    if sequences.key_gather is None:
        return
    slots = sequences.key_gather.cpu()
    for span in sequences.spans:
        position = span.key_length - span.query_length
        lowest = 0 if band.left is None else max(0, position - band.left)
        first = int(slots[span.row, span.key_start + lowest]) if span.query_length else request.key_offset
        if first < request.key_offset:
            raise SparseAttentionError(
                f"row {span.row}: the model's window reaches back to slot {first}, but its sliding cache holds keys "
                f"from slot {request.key_offset} on: zeros inside attention_mask set tokens apart. Pad on the left, or "
                "generate with a sa_hf.sparse_cache(model)"
            )
