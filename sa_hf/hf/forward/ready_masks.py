"""Masks of padding that a model makes by itself, instead of asking Transformers' mask functions for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.forward.masks import MaskRequest

# Models hide by the least number of a dtype, by -inf or by -10000, of which the exponential is 0 in each.
_HIDDEN = -9e3
# On a mask: the request that it was read as, for the other layers of the forward.
_HELD = "sa_hf_read"


def is_padding(mask: Any, causal: bool) -> bool:
    """Whether a ready-made mask can be one of padding alone: ``[batch, 1, 1, keys]``, of a stack that is not causal."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and not causal


def padding_of(mask: Tensor) -> Tensor:
    """What a mask hides of the keys, ``[batch, keys]`` (1 real, 0 padding).

    Args: mask: ``[batch, 1, 1, keys]`` or ``[batch, keys]``, bool (True real) or to add (0 real).

    Raises:
        SparseAttentionError: it adds something else than 0 to what it does not hide.
    """
    row = mask[:, 0, 0] if mask.dim() == 4 else mask
    if row.dtype == torch.bool:
        return row.long()
    real = row > _HIDDEN
    if bool((row * real).any()):
        raise SparseAttentionError(
            "the model's own mask adds numbers to the scores of some keys, where one of padding adds 0 or hides; a "
            "pattern would drop them. Keep such layers dense"
        )
    return real.long()


def read_padding(mask: Tensor, query: Tensor, key: Tensor) -> MaskRequest:
    """A ready-made mask of padding as the request that the model did not make; once for all layers.

    Raises:
        UnsupportedModelError: under torch.compile: its values are read.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedModelError(
            "under torch.compile a model must ask Transformers for its mask; this one makes it by itself: run it "
            "uncompiled"
        )
    held: MaskRequest | None = getattr(mask, _HELD, None)
    if held is None:
        held = MaskRequest(
            {
                "batch_size": query.shape[0], "q_length": query.shape[2], "kv_length": key.shape[2],
                "mask_function": bidirectional_mask_function, "attention_mask": padding_of(mask),
                "dtype": query.dtype, "device": query.device,
            }
        )  # fmt: skip
        setattr(mask, _HELD, held)
    return held
