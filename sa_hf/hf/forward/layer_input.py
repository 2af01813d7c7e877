"""What an attention module is called with, handed to the adapter: its input, rotary angles, cache and mask request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import LayerMemory, cache_in
from sa_hf.hf.forward.convolution import ConvTaps
from sa_hf.hf.forward.masks import MaskRequest, traced_sequences
from sa_hf.hf.forward.position_bias import bias_table, has_bias_table
from sa_hf.hf.state.activity import IMPLEMENTATION, place_of
from sa_hf.hf.state.layers import active_child
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.sequences import Sequences


@dataclass(eq=False)
class Carried:
    """What a call of an attention module carries for its pattern: the layer's input ``[batch, queries, hidden]``, the
    rotary angles ``(cos, sin)``, the cache and the mask request, each None where there is none. The probe proves with
    the installed transformers that they are found. ``cut`` is as in :class:`LayerCall`."""

    hidden: Any
    rotary: Any
    cache: Any
    request: MaskRequest | None
    cut: MaskRequest | None = None

    @classmethod
    def by(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Carried:
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        rotary = kwargs.get("position_embeddings")
        if rotary is None and len(args) > 1 and isinstance(args[1], tuple):
            rotary = args[1]
        request = kwargs.get("attention_mask")
        if not isinstance(request, MaskRequest):
            # Some models hand down a mask for each kind of mixer by its name (Zaya).
            masks = [y for x in (*args, *kwargs.values()) for y in (x.values() if isinstance(x, dict) else [x])]
            request = next((x for x in masks if isinstance(x, MaskRequest)), None)
        return cls(hidden, rotary, cache_in(args, kwargs), request)


@dataclass(eq=False)
class LayerCall:
    """What the pre-hook of an attention module saw, handed to the adapter as one extra keyword; ``cut`` is the
    mask request of one that cuts its row into sequences by itself."""

    hidden_states: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    memory: LayerMemory | None = None
    cut: MaskRequest | None = None


# What a pattern reads grows with every token, so a compiled decode step runs its attention outside the graph: traced,
# it would be compiled anew for each token.
NO_CACHE_IN_GRAPHS = "sparse attention with a cache runs outside a graph; compile the whole with use_cache=False"


def attention_pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hands the layer's input, rotary angles and cache to the adapter, through one extra keyword."""
    place = place_of(module)
    if not place.activity.on:
        return None
    _check_implementation(module)
    given = Carried.by(args, kwargs)
    hidden, request = given.hidden, given.request
    memory, child = LayerMemory.of(given.cache, place.index), active_child(module)
    if memory is not None:
        memory.announce(child)
    kwargs = {**kwargs, "sparse_call": LayerCall(hidden, given.rotary, memory)}
    conv = child._modules.get("conv")
    if isinstance(conv, ConvTaps):
        place.conv.follow()
        prepare = _prepare_uncompiled if memory is not None and torch.compiler.is_compiling() else _prepare
        prepare(conv, hidden, module, request, memory)
    if has_bias_table(module) and kwargs.get("position_bias") is None:
        kwargs["position_bias"] = bias_table(module, _positions(request, hidden), hidden.device)
    return args, kwargs


def _check_implementation(module: nn.Module) -> None:
    """That the layer will ask for the adapter: a part that was copied inside ``dense(model)`` would not, nor would a
    model whose config was set to another attention by hand."""
    config: Any = getattr(module, "config", None)
    if config is None or vars(config).get("_attn_implementation_internal") == IMPLEMENTATION:  # the property: 5 us
        return
    asked = getattr(config, "_attn_implementation", IMPLEMENTATION)
    if asked != IMPLEMENTATION:
        raise SparseAttentionError(
            f"the config of {type(module).__name__} was set to attn_implementation={asked!r}, so its pattern would not "
            "run; use `with sa_hf.dense(model):` or `sa_hf.unpatch_model(model)`, and copy a part of a patched model "
            "outside of `dense`"
        )


@with_host_defaults
def _prepare(
    conv: ConvTaps, hidden: Tensor, module: nn.Module, request: MaskRequest | None, memory: LayerMemory | None
) -> None:
    conv.prepare(hidden, _layer_sequences(module, request, hidden), memory)


_prepare_uncompiled = torch.compiler.disable(_prepare, reason=NO_CACHE_IN_GRAPHS)


def _layer_sequences(module: nn.Module, request: MaskRequest | None, hidden: Any) -> Sequences:
    place = place_of(module)
    if request is not None and torch.compiler.is_compiling():
        causal = place.spec is not None and place.spec.causal
        return cast(Sequences, traced_sequences(request, place.activity.traced, causal, place.extra_tokens))
    if request is not None:
        return request.sequences(place.extra_tokens)
    length = int(hidden.shape[1]) - place.extra_tokens
    return Sequences.full(hidden.shape[0], length, length).with_extra_tokens(place.extra_tokens)


def _positions(request: Any, hidden: Any) -> int:
    """Positions, past ones included, that a layer's distances may span."""
    return request.key_offset + request.shape[-1] if isinstance(request, MaskRequest) else int(hidden.shape[1])
