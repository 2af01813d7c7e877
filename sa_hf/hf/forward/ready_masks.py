"""Masks that a model makes by itself, instead of asking Transformers' mask functions for them, read as what they say.

A mask of keys says what is padding. One of pairs is read where it is causality, padding and sequences one after
another, and nothing else: that it is, is checked pair by pair. Towers of packed patches name lengths instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
)

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.forward.masks import MaskRequest, ids_from_lengths
from sa_hf.hf.state.inputs import ForwardInputs, handed_over

# Models hide by the least number of a dtype, by -inf or by -10000, of which the exponential is 0 in each.
_HIDDEN = -9e3
_INSTEAD = "Give the model a 2-D mask [batch, length] (1 real, 0 padding), or keep such layers dense"
# On a mask: what it was read as, for the other layers of the forward.
_HELD = "sa_hf_read"


@dataclass(frozen=True, eq=False)
class _Held:
    forward: ForwardInputs | None
    version: int
    causal: bool
    request: MaskRequest


def read_mask(mask: Any, query: Tensor, key: Tensor, causal: bool, extra_tokens: int = 0) -> Any:
    """A ready-made mask as the request that the model did not make, once for all layers that get it; what is no mask of
    all heads in one (``[batch, 1, queries or 1, keys]``) stays as it is. A request for one query that all queries are
    to read (BridgeTower, VisualBERT) is made one for all.

    Raises:
        SparseAttentionError: it says something else than causality, padding and sequences.
        UnsupportedModelError: under torch.compile: its values are read.
    """
    if isinstance(mask, MaskRequest) and not causal and mask.query_length == 1 < query.shape[2] == key.shape[2]:
        return mask.for_queries(query.shape[2])
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1 or mask.is_meta:
        return mask
    of_keys = mask.shape[2] == 1 and not causal
    if not of_keys and (mask.shape[2] != query.shape[2] - extra_tokens or mask.shape[2] > mask.shape[3]):
        return mask  # of fewer keys than queries: those of another sequence (Idefics' images)
    if torch.compiler.is_compiling():
        raise UnsupportedModelError(
            "under torch.compile a model must ask Transformers for its mask; this one makes it by itself: run it "
            "uncompiled"
        )
    return _once(mask, causal, lambda: _read_keys(mask, query, key) if of_keys else _read_pairs(mask, query, causal))


def _once(mask: Tensor, causal: bool, read: Callable[[], MaskRequest]) -> MaskRequest:
    """What ``read`` gives, kept on the mask while the same forward runs and the mask is not written to: a caller may
    give the same one again."""
    forward, version = handed_over(), 0 if mask.is_inference() else mask._version
    held: _Held | None = getattr(mask, _HELD, None)
    if held is None or held.forward is not forward or (held.version, held.causal) != (version, causal):
        held = _Held(forward, version, causal, read())
        setattr(mask, _HELD, held)
    return held.request


def padding_of(mask: Tensor) -> Tensor:
    """What a mask hides of the keys, ``[batch, keys]`` (1 real, 0 padding).

    Args: mask: ``[batch, 1, 1, keys]`` or ``[batch, keys]``, bool (True real) or to add (0 real).

    Raises:
        SparseAttentionError: it adds something else than 0 to what it does not hide.
    """
    return _seen(mask[:, 0, 0] if mask.dim() == 4 else mask).long()


def packed_request(lengths: Tensor, hidden: Tensor) -> MaskRequest:
    """The request of a layer that cuts one row into sequences by itself; once for all layers with these lengths.

    Args: lengths: ``[0, n0, n0 + n1, ...]``; hidden: the layer's input ``[tokens, width]`` or ``[1, tokens, width]``.

    Raises:
        SparseAttentionError: the lengths do not make up the row.
        UnsupportedModelError: under torch.compile: they are read.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedModelError(
            "under torch.compile a row of packed patches cannot be cut, as its lengths are read: run it uncompiled"
        )
    tokens = hidden.shape[-2]

    def read() -> MaskRequest:
        if int(lengths[-1]) != tokens:
            raise SparseAttentionError(
                f"the sequences of a row of {tokens} tokens end at {int(lengths[-1])}; cu_seqlens must end at {tokens}"
            )
        return _request(1, tokens, tokens, None, ids_from_lengths(lengths, 1, tokens), False, hidden)

    return _once(lengths, False, read)


def _read_keys(mask: Tensor, query: Tensor, key: Tensor) -> MaskRequest:
    return _request(query.shape[0], query.shape[2], key.shape[2], padding_of(mask), None, False, query)


def _read_pairs(mask: Tensor, query: Tensor, causal: bool) -> MaskRequest:
    padding, ids = relation_of(mask[:, 0], causal)
    batch, queries, keys = query.shape[0], mask.shape[2], mask.shape[3]
    padding, ids = (None if x is None else x.expand(batch, -1) for x in (padding, ids))
    return _request(batch, queries, keys, None if padding is None else padding.long(), ids, causal, query)


def relation_of(mask: Tensor, causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """Which keys are real and which sequence they are of, ``[batch, keys]`` each; None where all are real, or one.

    A key is real where any query reads it. What rows of padding read does not matter.

    Args: mask: ``[batch, queries, keys]``, of the last queries, bool (True: may read) or to add (0: may).

    Raises:
        SparseAttentionError: a real query reads other keys than the real ones of its sequence (those up to itself,
            where ``causal``).
    """
    seen = _seen(mask)
    queries, keys = seen.shape[1:]
    first, slots = keys - queries, torch.arange(keys, device=seen.device)
    real = seen.any(1)
    ids = _runs_of(seen, real) if first == 0 else real.new_zeros(real.shape, dtype=torch.long)
    expected = (ids[:, first:, None] == ids[:, None, :]) & real[:, None, :]
    if causal:
        expected &= slots <= slots[first:, None]
    # Fewer queries are the last: behind them are no places that no one reads (those of a static cache).
    behind = first > 0 and not bool((real[:, -1] | ~real.any(1)).all())
    if behind or bool(((seen != expected) & real[:, first:, None]).any()):
        raise SparseAttentionError(
            f"a ready-made mask of shape {tuple(mask.shape)} is not "
            f"{'causality' if causal else 'all pairs'} inside padding and sequences one after another, and a pattern "
            f"would drop what else it says. {_INSTEAD}"
        )
    return None if bool(real.all()) else real, None if bool((ids <= 1).all()) else ids


def _runs_of(seen: Tensor, real: Tensor) -> Tensor:
    """The number ``[batch, n]`` of each token's sequence, which begins where a real token does not read the real one
    before it."""
    slots = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, slots, -1).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    joined = seen.gather(2, before.clamp(min=0)[..., None])[..., 0] & (before >= 0)
    return (real & ~joined).cumsum(1)


def _seen(mask: Tensor) -> Tensor:
    """What a mask, bool or to add, does not hide."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask > _HIDDEN
    if bool(((mask != 0) & seen).any()):
        raise SparseAttentionError(
            "the model's own mask adds numbers to the scores of some keys, where one of padding or of sequences adds 0 "
            f"or hides; a pattern would drop them. {_INSTEAD}"
        )
    return seen


def _request(
    batch: int, queries: int, keys: int, padding: Tensor | None, ids: Tensor | None, causal: bool, like: Tensor
) -> MaskRequest:
    function = causal_mask_function if causal else bidirectional_mask_function
    request = MaskRequest(
        {
            "batch_size": batch, "q_length": queries, "kv_length": keys, "q_offset": keys - queries if causal else 0,
            "mask_function": function if ids is None else and_masks(function, packed_sequence_mask_function(ids)),
            "attention_mask": padding, "dtype": like.dtype, "device": like.device,
        }
    )  # fmt: skip
    given = request.given
    request.cuts = ids is not None
    if given is not None:
        if request.cuts and (given.sequence_ids is not None or given.cu_seq_lens is not None):
            raise sequences_twice()
        # Positions that restart do not cut what a mask leaves whole, and may be those of other tokens.
        request.given = replace(given, position_ids=None)
    return request


def sequences_twice() -> SparseAttentionError:
    """The error for a call that names sequences where the model does so by itself."""
    return SparseAttentionError(
        "sequence_ids and cu_seq_lens_q name the sequences of a layer whose model already tells them apart (the "
        "patches of each image); leave them out"
    )
