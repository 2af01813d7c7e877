"""What models join to the mask that they have asked for, and the mask functions registered beside the adapter.

Falcon joins numbers, its ALiBi, which one of its layers takes off again. T5Gemma 2's decoder joins the mask of its
encoder's tokens, whose keys its layers read beside their own.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.state.inputs import ForwardInputs, handed_over

# Models that read the encoder's keys beside their own, under one mask.
MERGING = ("t5gemma2_decoder",)


class JoinableRequest(MaskRequest):
    """One that a model joins something to: numbers by ``torch.masked_fill(numbers, mask < -1, least)``, or the mask of
    an encoder's tokens by ``torch.cat([own, encoder's], dim=-1)``. What else computes with a mask fails, as with any,
    and the probe says where."""

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.arguments.get("dtype", torch.float32)
        return dtype

    def __lt__(self, bound: Any) -> MaskRequest:
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is torch.masked_fill and not kwargs and isinstance(args[1], JoinableRequest):
            return args[1]._with(args[0])
        if function is torch.cat and kwargs == {"dim": -1} and len(args[0]) == 2:
            own, others = args[0]
            plain = isinstance(others, MaskRequest) and others.joined is None
            if plain and others.arguments["mask_function"] is bidirectional_mask_function:
                return own._with(others)
        return NotImplemented

    def _with(self, joined: Tensor | MaskRequest) -> JoinableRequest:
        request = copy(self)
        request.joined, request._dense = joined, {}
        return request

    def to(self, *args: Any, **kwargs: Any) -> MaskRequest:
        if not isinstance(self.joined, MaskRequest):
            return super().to(*args, **kwargs)
        moved = JoinableRequest.of(self.unjoined.to(*args, **kwargs))
        return moved._with(self.joined.to(*args, **kwargs))

    @classmethod
    def of(cls, request: MaskRequest) -> JoinableRequest:
        """The same request as one of this kind."""
        if isinstance(request, JoinableRequest):
            return request
        made = cls(request.arguments)
        made.given, made.whole = request.given, request.whole
        return made

    def dense(self, implementation: str, extra_tokens: int = 0, given: ForwardInputs | None = None) -> Any:
        if not isinstance(self.joined, MaskRequest):
            return super().dense(implementation, extra_tokens, given)
        key = implementation, extra_tokens
        if key not in self._dense:
            own, others = self.unjoined.dense(implementation, extra_tokens, given), self.joined.dense(implementation)
            self._dense[key] = torch.cat([own, others[:, :, :1].expand(-1, -1, own.shape[2], -1)], -1)
        return self._dense[key]


def sparse_mask(*, attention_mask: Any = None, **arguments: Any) -> MaskRequest:
    """The mask function registered beside the adapter: keeps the request."""
    if isinstance(attention_mask, MaskRequest):
        return attention_mask  # `generate` builds masks ahead of the forward, which then asks again
    if attention_mask is not None and attention_mask.dim() != 2:
        raise SparseAttentionError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; sparse attention takes a 2-D mask "
            "[batch, length] (1 real, 0 padding)"
        )
    config = arguments.get("config")
    joins = getattr(config, "alibi", False) is True or getattr(config, "model_type", None) in MERGING
    kind = JoinableRequest if joins else MaskRequest
    return kind({**arguments, "attention_mask": attention_mask})


def packed_mask(*, config: Any = None, attention_mask: Any = None, **arguments: Any) -> Any:
    """The mask function inside ``dense(model)`` for a call that names its sequences: the original mask within them."""
    given = handed_over()
    original = None if given is None else given.originals.get(id(config))
    if original is None:
        raise UnsupportedModelError(
            "sequence_ids inside dense(model) need a model that builds its masks by its own configs, which this one "
            "does not; pad the batch instead"
        )
    return MaskRequest({**arguments, "config": config, "attention_mask": attention_mask}).dense(original, given=given)
