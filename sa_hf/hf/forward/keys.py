"""Keys and values at their slots, whatever a cache hands out."""

from __future__ import annotations

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
    dropped, length = inputs.key_slots, inputs.sequences.key_length  # by a sparse cache
    if dropped is None:
        inputs.key_slots = _slots_of_sliding(child, inputs, request)
    if inputs.key_slots is not None and child.reads_listed_keys(inputs):
        inputs.key, inputs.value = (x[:, :, : len(inputs.key_slots)] for x in (inputs.key, inputs.value))
        return
    inputs.key, inputs.value = absolute_keys(inputs.key, inputs.value, length, request, dropped)
    inputs.key_slots = None


def _slots_of_sliding(child: SparseAttention, inputs: AttentionInputs, request: MaskRequest | None) -> Tensor | None:
    """The slots of the keys of a sliding cache that has dropped others, for static patterns alone (a learned one's own
    state is of every token), else None."""
    first, length = 0 if request is None else request.key_offset, inputs.sequences.key_length
    static = all(isinstance(leaf, StaticSparseAttention) for leaf in leaves(child))
    if not first or not static or inputs.sequences.extra_tokens or first + inputs.key.shape[2] < length:
        return None
    return torch.arange(first, length)


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
