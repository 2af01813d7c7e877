"""Attention that Transformers computes by itself, asking the attention interface instead.

An attention module of such an architecture gets, while its model is patched, a class on top of its own: where the
config asks for our attention it hands queries, keys and values to the interface; else its own ``forward`` runs, so
``dense(model)`` stays bit for bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    sliding_window_bidirectional_overlay,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sa_hf.config import SparseAttention
from sa_hf.hf.caches.layer import cache_in
from sa_hf.hf.forward.keywords import SINKS, TERMS
from sa_hf.hf.forward.layer_input import LayerCall
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.forward.position_bias import Terms, expanded_terms
from sa_hf.hf.forward.ready_masks import padding_of
from sa_hf.hf.state.activity import IMPLEMENTATION, DenseMarker
from sa_hf.hf.state.layers import active_child

# The keywords of a call that our attention reads.
_HANDED_ON = {"sparse_call", "output_attentions", "sequence_ids", "cu_seq_lens_q"}
# On a mask: what it was made to, by what was asked for, for the other layers of the forward.
_HELD = "sa_hf_asked"
# What a cache is called where masks are asked for: this since 5.24.
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def asked_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    dropout: float = 0.0, scaling: float | None = None, position_bias: Tensor | None = None,
    distance_terms: Terms | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dense attention of a layer that its patch leaves dense, softmax in float32 at least."""
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    if 1 < key.shape[1] < query.shape[1]:  # heads that share their keys
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if position_bias is not None:
        scores = scores + expanded_table(position_bias, query.shape[2], key.shape[2])
    if distance_terms is not None:
        scores = scores + expanded_terms(distance_terms, query.shape[2], key.shape[2])
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = nn.functional.dropout(weights.to(value.dtype), dropout, module.training)
    return torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous(), weights


def expanded_table(bias: Tensor, queries: int, keys: int) -> Tensor:
    """A bias of distances ``[1, heads, 1, 2 N - 1]`` as one of pairs; one of pairs stays."""
    if bias.shape[2] == queries and bias.shape[3] == keys:
        return bias
    i = torch.arange(keys - queries, keys, device=bias.device)[:, None]
    j = torch.arange(keys, device=bias.device)[None, :]
    return bias[:, :, 0][:, :, j - i + bias.shape[-1] // 2]


def asks(module: Any) -> bool:
    """Whether the config of a module asks for our attention now (or the probe's, which goes by its name)."""
    return str(module.config._attn_implementation).startswith(IMPLEMENTATION)


class Asking:
    """Put on top of an attention module's class; ``asked(hidden, args, kwargs)`` is its ``forward`` where it asks.

    Attributes: own: the class below; own_eager: the eager attention that it calls is that of its module; causal: what
    the module is, None where it says so itself; widened: whether its queries and keys have channels beside their own,
    which hold a bias (``unwidened``: how many they are without, where that is no fixed number); has_distance_terms:
    whether it hands terms of the distance on; has_sinks: whether it hands on a logit of each head that joins the
    softmax; needs: what a module must have, where a release gives the same name to another one; sa_hf_around: the names
    of the classes of the modules around it.
    """

    asks_interface: ClassVar[bool] = True
    own_eager: ClassVar[bool] = False
    own: ClassVar[Any]
    causal: ClassVar[bool | None] = False
    widened: ClassVar[bool] = False
    has_distance_terms: ClassVar[bool] = False
    has_sinks: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not asks(self):
            return self.own.forward(self, hidden_states, *args, **kwargs)
        return self.asked(hidden_states, args, kwargs)

    def asked(self, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def prepare(self) -> None:
        """Set what the rest of the package reads on an attention module and this one lacks."""

    def __reduce__(self) -> Any:
        return _new_asking, (type(self).__bases__[0], self.own), vars(self).copy()


class AskingSparse(Asking):
    """One that asks for a pattern alone: a layer left dense, and ``dense(model)``, run the class below, with the eager
    attention of its module. ``asked`` finds the call of the layer among the keywords, ``sparse_call``."""

    causal: ClassVar[bool | None] = None
    own_eager: ClassVar[bool] = True

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.get("sparse_call")
        if call is None or (isinstance(call, LayerCall) and not isinstance(active_child(self), SparseAttention)):
            return self.own.forward(self, hidden_states, *args, **kwargs)
        return self.asked(hidden_states, args, kwargs)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], *,
    narrow: Callable[[Any], Any] | None = None, bias: Callable[[int], Tensor] | None = None, dropout: float = 0.0,
    scaling: float | None = None, widen: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    terms: Terms | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The interface's attention ``[batch, queries, heads * head_dim]``; the cache among the arguments is updated first.

    Args: narrow: what becomes of the mask; bias: the table of distances up to a length; widen: what becomes of queries
    and keys beside their values, those of the cache included; terms: of the queries and of the keys with the distance;
    sinks: a logit of each head.
    """
    cache = cache_in(args, kwargs)
    if cache is not None:
        cache = getattr(cache, "self_attention_cache", cache)
        key, value = cache.update(key, value, module.layer_idx)
    if widen is not None:
        query, key = widen(query, key, value)
    mask = mask_in(args, kwargs)
    call = {name: x for name, x in kwargs.items() if name in _HANDED_ON}
    if bias is not None:
        call["position_bias"] = bias(max(key.shape[2], _positions(mask)))
    if terms is not None and terms != (None, None):
        call[TERMS] = terms
    if sinks is not None:
        call[SINKS] = sinks
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, asked_attention_forward)
    out = function(
        module, query, key, value, mask if narrow is None else narrow(mask),
        dropout=dropout if module.training else 0.0, scaling=scaling, **call,
    )[0]  # fmt: skip
    flat: Tensor = out.flatten(2)
    return flat


def left_dense(module: nn.Module) -> bool:
    """Whether a layer of a patched model has no pattern."""
    return isinstance(getattr(module, "sparse", None), DenseMarker)


def _positions(mask: Any) -> int:
    """Places that a call's distances may span: a cache may have dropped keys."""
    if not isinstance(mask, MaskRequest):
        return 0
    return max(mask.key_offset + mask.shape[-1], mask.query_offset + mask.query_length)


def mask_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mask of a call: under its name, else the first argument after the hidden states."""
    return kwargs["attention_mask"] if "attention_mask" in kwargs else (args[0] if args else None)


def asked_mask(module: Any, hidden: Tensor, mask: Tensor | None, *, causal: bool, window: int | None = None) -> Any:
    """The mask that a layer would have been given, had its model asked for one: of what its own mask hides of the keys.

    Args: mask: the model's, ``[batch, keys]`` or ``[batch, 1, 1, keys]``, to add (0 real); window: so many keys on
    either side of its own.
    """
    held, key = getattr(mask, _HELD, {}), (module.config._attn_implementation, causal, window)
    if key in held:
        return held[key]
    create: Any = create_causal_mask if causal else create_bidirectional_mask
    padding = None if mask is None else padding_of(mask)
    made = create(
        config=module.config, inputs_embeds=hidden, attention_mask=padding,
        **({_CACHE: None, "position_ids": None} if causal else {}),
        **({} if window is None else {"and_mask_function": sliding_window_bidirectional_overlay(window)}),
    )  # fmt: skip
    if mask is not None:
        setattr(mask, _HELD, {**held, key: made})
    return made


def heads(x: Tensor, count: int) -> Tensor:
    """``[batch, n, count * head_dim]`` as ``[batch, count, n, head_dim]``."""
    split: Tensor = x.unflatten(-1, (count, -1))
    return split.transpose(1, 2)


@lru_cache(maxsize=256)
def asking_class(mixin: type[Asking], own: type) -> Any:
    """A class of the same name that asks."""
    module = own.__module__ if mixin.own_eager else mixin.__module__
    body = {"__module__": module, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "own": own}
    return type(own.__name__, (mixin, own), body)


def dense_masks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's keywords with the mask that an attention of the model's own takes (cross-attention stays dense)."""
    return {name: x.dense("eager") if isinstance(x, MaskRequest) else x for name, x in kwargs.items()}


def _new_asking(mixin: Any, own: Any) -> Any:
    made: Any = asking_class(mixin, own)
    return made.__new__(made)
