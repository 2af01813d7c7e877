"""The one function that transformers calls in a patched model, and what it runs.

It works only through the ``sparse`` child that every attention module of a patched model has (a marker without
state where the layer stays dense) and raises where that is absent: a model that was loaded without its patterns
cannot run dense in silence.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import LayerMemory, absolute_keys, cache_in, check_reach
from sa_hf.hf.forward.convolution import ConvTaps
from sa_hf.hf.forward.keywords import unknown_keywords
from sa_hf.hf.forward.masks import (
    ForwardInputs,
    MaskRequest,
    check_no_past,
    handed_over,
    packed_mask,
    said_ids,
    sparse_mask,
    traced_sequences,
)
from sa_hf.hf.forward.position_bias import bias_table, expanded_bias, has_bias_table
from sa_hf.hf.forward.rotary import before_rotary
from sa_hf.hf.patching.families import window_band
from sa_hf.hf.state.layers import active_child, leaves, remembers
from sa_hf.hf.state.recomputation import Forwards, in_backward
from sa_hf.hf.state.versions import tested_range
from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import default_scale
from sa_hf.patterns.learned import LearnedAttention

IMPLEMENTATION = "sparse_sa_hf"
# What a model runs inside dense(model) for a call that names its sequences.
PACKED = "packed_sa_hf"
# On an attention module, beside its child: PEFT may wrap and copy the child itself.
PLACE = "sa_hf_place"


@dataclass(eq=False)
class Activity:
    """Whether a patched model's hooks act; off inside ``dense(model)``. ``traced`` is what the outer call was given,
    under torch.compile, which traces an attribute and no context variable. ``forwards`` are those in training;
    ``within`` is the outermost model's ``ModelForward`` while it runs; ``owner`` is the class of the model that is
    patched; ``collected`` takes the auxiliary losses where a caller adds them by itself (``collected_losses``);
    ``warned`` says that losses of unknown scale were warned about."""

    owner: str = "model"
    on: bool = True
    forwards: Forwards = field(default_factory=Forwards)
    within: Any = None
    warned: bool = False
    traced: ForwardInputs | None = None
    collected: list[Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside dense(model) is no part of that block, and nothing would ever switch it on again.
        left = {"traced": None, "collected": None, "within": None, "forwards": Forwards()}
        return {**vars(self), "on": True, **left}


@dataclass(eq=False)
class Place:
    """How one attention module runs. ``spec`` is None for cross-attention."""

    spec: LayerSpec | None
    engine: str
    original: str
    activity: Activity
    extra_tokens: int = 0


class DenseMarker(nn.Module):
    """The ``sparse`` child of a layer that stays dense, and of cross-attention: no parameters, no buffers."""


@dataclass(eq=False)
class Carried:
    """What a call of an attention module carries for its pattern: the layer's input ``[batch, queries, hidden]``, the
    rotary angles ``(cos, sin)``, the cache and the mask request, each None where there is none. The probe proves with
    the installed transformers that they are found."""

    hidden: Any
    rotary: Any
    cache: Any
    request: MaskRequest | None

    @classmethod
    def by(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Carried:
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        rotary = kwargs.get("position_embeddings")
        if rotary is None and len(args) > 1 and isinstance(args[1], tuple):
            rotary = args[1]
        request = next((x for x in (*args, *kwargs.values()) if isinstance(x, MaskRequest)), None)
        return cls(hidden, rotary, cache_in(args, kwargs), request)


@dataclass(eq=False)
class LayerCall:
    """What the pre-hook of an attention module saw, handed to the adapter as one extra keyword."""

    hidden_states: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    memory: LayerMemory | None = None


def register() -> None:
    """Make the adapter known to transformers; done at the first patch, never at import."""
    AttentionInterface.register(IMPLEMENTATION, sparse_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sparse_mask)
    AttentionInterface.register(PACKED, packed_attention_forward)
    AttentionMaskInterface.register(PACKED, packed_mask)


def place_of(module: nn.Module) -> Place:
    """How an attention module of a patched model runs.

    Raises:
        SparseAttentionError: the module has none, so the model's patterns are missing.
    """
    place = getattr(module, PLACE, None)
    if not isinstance(place, Place) or getattr(module, "sparse", None) is None:
        raise SparseAttentionError(
            f"{type(module).__name__} is set to sparse attention but carries no pattern: the model was built from the "
            "config of a patched one. Load it by its Auto class with `trust_remote_code=True`, or call "
            "`sa_hf.patch_model(model, ...)`. As a reference that a trainer makes of the model (trl), give it "
            "`ref_model=copy.deepcopy(model)`, or train LoRA, which needs none"
        )
    return place


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: output ``[batch, queries, heads, head_dim]`` and no attention weights."""
    place = place_of(module)
    call: LayerCall = kwargs.pop("sparse_call", None) or LayerCall()
    if isinstance(attention_mask, Tensor):
        raise SparseAttentionError(
            f"a mask of shape {tuple(attention_mask.shape)} reached {type(module).__name__}; sparse attention takes a "
            "2-D mask [batch, length] (1 real, 0 padding), given to the model"
        )
    request: MaskRequest | None = attention_mask
    child = active_child(module)
    if not isinstance(child, SparseAttention):
        return _dense_forward(module, place, query, key, value, request, scaling, dropout, kwargs)
    attend = _attend
    if call.memory is not None and torch.compiler.is_compiling():
        attend = _attend_uncompiled
    return attend(module, place, child, call, query, key, value, request, scaling, dropout, kwargs), None


@with_host_defaults
def _attend(
    module: nn.Module, place: Place, child: SparseAttention, call: LayerCall, query: Tensor, key: Tensor, value: Tensor,
    request: MaskRequest | None, scaling: float | None, dropout: float, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """One layer's pattern: output ``[batch, queries, heads, head_dim]``."""
    bias = kwargs.pop("position_bias", None)
    softcap = kwargs.pop("softcap", None)
    window = kwargs.pop("sliding_window", None)
    causal = kwargs.pop("is_causal", None)
    _refuse(module, kwargs)
    if call.memory is None and key.shape[2] > query.shape[2] and remembers(child):
        raise _no_memory(module, place, query.shape[2], key.shape[2])
    if request is not None and torch.compiler.is_compiling():
        causal = bool(getattr(module, "is_causal", False)) if causal is None else causal
        band = window_band(window, causal) if place.spec is None else place.spec.band
        # What waits for the operator stands in for sequences: static patterns alone take it, the others raise.
        sequences = cast(Sequences, traced_sequences(request, place.activity.traced, causal, place.extra_tokens))
    else:
        if causal is None:
            causal = request.causal if request is not None else bool(getattr(module, "is_causal", False))
        band = request.band if request is not None else window_band(window, causal)
        sequences = _sequences(place, request, query, key, kwargs)
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        sequences=sequences,
        causal=causal,
        scale=default_scale(query.shape[-1]) if scaling is None else float(scaling),
        band=band,
        softcap=softcap,
        distance_bias=None if bias is None else bias[0, :, 0],
        dropout=float(dropout),
        engine=place.engine,
        hidden_states=call.hidden_states,
        before_rotary=partial(before_rotary, module, call.rotary),
        remember=None if call.memory is None else call.memory.remember,
    )
    started = handed_over() if request is None else None if torch.compiler.is_compiling() else request.given
    for leaf in leaves(child):
        leaf.steps_back = _steps_back(module, leaf, started)
    if call.memory is not None:
        call.memory.settle()
        inputs.key_slots = call.memory.kept_slots(sequences.key_length)
    if inputs.key_slots is None and request is not None and request.key_offset:
        check_reach(request, sequences, band)
    if place.spec is not None and not place.spec.causal and inputs.key_slots is None:
        check_no_past(key.shape[2], sequences.key_length)
    if inputs.key_slots is None or not child.reads_listed_keys(inputs):
        inputs.key, inputs.value = absolute_keys(key, value, sequences.key_length, request, inputs.key_slots)
        inputs.key_slots = None
    out = _run(child, inputs)
    if call.memory is not None:
        call.memory.evict(child, inputs)
    conv = getattr(child, "conv", None)
    if isinstance(conv, ConvTaps):
        conv.forget()
    return out.transpose(1, 2).contiguous()


def _steps_back(module: nn.Module, leaf: SparseAttention, started: ForwardInputs | None) -> int:
    """How many forwards in training ago the running one began."""
    if not (leaf.training and isinstance(leaf, LearnedAttention)) or torch.compiler.is_compiling():
        return 0
    number = None if started is None else started.numbers.get(id(leaf))
    if number is not None:
        return leaf.forwards - number
    if not leaf.draws_by_forward and in_backward():
        return 0
    raise SparseAttentionError(
        f"{type(module).__name__} with {leaf.config.name!r} trains, but was reached outside of any forward of a "
        "Transformers model, or in a recomputation that does not say of which: steps would not be counted, auxiliary "
        "losses would be lost. Call the model (model(...), model.forward(...) or a model inside it), not its layers; "
        "checkpoint layers by model.gradient_checkpointing_enable()"
    )


def _run(child: SparseAttention, inputs: AttentionInputs) -> Tensor:
    """The pattern, in one precision: under autocast torch's own attention casts queries, keys and values as well."""
    kind = inputs.query.device.type
    if not torch.is_autocast_enabled(kind):
        out: Tensor = child(inputs)
        return out
    dtype = torch.get_autocast_dtype(kind)
    inputs.query, inputs.key, inputs.value = (x.to(dtype) for x in (inputs.query, inputs.key, inputs.value))
    with torch.autocast(kind, enabled=False):
        out = child(inputs)
    return out


# What a pattern reads grows with every token, so a compiled decode step runs its attention outside the graph: traced,
# it would be compiled anew for each token.
NO_CACHE_IN_GRAPHS = "sparse attention with a cache runs outside a graph; compile the whole with use_cache=False"
_attend_uncompiled = torch.compiler.disable(_attend, reason=NO_CACHE_IN_GRAPHS)


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise for keywords that ask for what sparse attention cannot give."""
    if kwargs.get("output_attentions"):
        refuse_attentions()
    unknown = unknown_keywords(kwargs)
    if unknown:
        raise SparseAttentionError(
            f"{type(module).__name__} hands {unknown[0]!r} to its attention, which sparse attention does not know and "
            "would have to drop; leave it out, or keep the layer dense"
        )


def _no_memory(module: nn.Module, place: Place, new: int, keys: int) -> SparseAttentionError:
    layer = "" if place.spec is None else f" in layer {place.spec.layer_idx}"
    return SparseAttentionError(
        f"{type(module).__name__}{layer} attends {keys} keys with {new} new tokens, but no cache reached its pattern, "
        "which keeps values of its own for every token; give the model a cache of transformers (DynamicCache, "
        "StaticCache, sa_hf.sparse_cache(model)) or use_cache=False. If you did, transformers "
        f"{transformers.__version__} hands it over in a way that sa_hf does not know ({tested_range()})"
    )


def refuse_attentions() -> None:
    raise SparseAttentionError(
        "output_attentions=True asks for the n x n attention weights, which sparse attention never builds; "
        "leave it out, or use `with sa_hf.dense(model):` and attn_implementation='eager'"
    )


def _sequences(
    place: Place, request: MaskRequest | None, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> Sequences:
    extra = place.extra_tokens
    ids, lengths = kwargs.get("sequence_ids"), kwargs.get("cu_seq_lens_q")
    if request is not None:
        if request.given is not None or (ids is None and lengths is None):
            return request.sequences(extra)
        ids = said_ids(ForwardInputs(ids, None, lengths), query.shape[0], request.query_length)
        return Sequences.from_mask(
            query.shape[0], request.query_length, request.query_length, request.padding, ids
        ).with_extra_tokens(extra)
    outer = handed_over()
    if ids is not None or lengths is not None or (outer is not None and outer.sequence_ids is not None):
        raise _without_mask()
    return Sequences.full(query.shape[0], query.shape[2] - extra, key.shape[2] - extra).with_extra_tokens(extra)


def _without_mask() -> SparseAttentionError:
    return SparseAttentionError(
        "sequence_ids and cu_seq_lens_q need a model that builds an attention mask; this one has none"
    )


def _given(place: Place, request: MaskRequest, kwargs: dict[str, Any]) -> ForwardInputs | None:
    """What the call was given about the sequences of this layer; cross-attention has none."""
    said = ForwardInputs(kwargs.pop("sequence_ids", None), None, kwargs.get("cu_seq_lens_q"))
    if place.spec is None:
        return None
    return place.activity.traced if torch.compiler.is_compiling() else request.given or said


def _dense_forward(
    module: nn.Module, place: Place, query: Tensor, key: Tensor, value: Tensor, request: MaskRequest | None,
    scaling: float | None, dropout: float, kwargs: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    """The original attention, with the mask that it would have got."""
    if kwargs.get("output_attentions"):
        refuse_attentions()
    mask = (
        None if request is None else request.dense(place.original, place.extra_tokens, _given(place, request, kwargs))
    )
    # Cross-attention computes its own bias, which is no table.
    if kwargs.get("position_bias") is not None and place.spec is not None:
        kwargs["position_bias"] = expanded_bias(kwargs["position_bias"], query, key, request, place.extra_tokens)
    function = _original_function(module, place)
    output: Tensor = function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    return output, None


def _original_function(module: nn.Module, place: Place) -> Any:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(place.original, eager)


def packed_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> Any:
    """A layer's original attention inside ``dense(model)``; the sequences are in its mask (:func:`packed_mask`)."""
    place = place_of(module)
    if attention_mask is None and place.spec is not None:
        raise _without_mask()
    return _original_function(module, place)(module, query, key, value, attention_mask, **kwargs)


def attention_pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hands the layer's input, rotary angles and cache to the adapter, through one extra keyword."""
    place = place_of(module)
    if not place.activity.on:
        return None
    _check_implementation(module)
    given = Carried.by(args, kwargs)
    hidden, request = given.hidden, given.request
    memory = LayerMemory.of(given.cache, module)
    if memory is not None:
        memory.announce(active_child(module))
    kwargs = {**kwargs, "sparse_call": LayerCall(hidden, given.rotary, memory)}
    conv = getattr(active_child(module), "conv", None)
    if isinstance(conv, ConvTaps):
        prepare = _prepare_uncompiled if memory is not None and torch.compiler.is_compiling() else _prepare
        prepare(conv, hidden, module, request, memory)
    if has_bias_table(module) and kwargs.get("position_bias") is None:
        kwargs["position_bias"] = bias_table(module, _positions(request, hidden), hidden.device)
    return args, kwargs


def _check_implementation(module: nn.Module) -> None:
    """That the layer will ask for the adapter: a part that was copied inside ``dense(model)`` would not, nor would a
    model whose config was set to another attention by hand."""
    config: Any = getattr(module, "config", None)
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
        causal = bool(getattr(module, "is_causal", False))
        return cast(Sequences, traced_sequences(request, place.activity.traced, causal, place.extra_tokens))
    if request is not None:
        return request.sequences(place.extra_tokens)
    length = int(hidden.shape[1]) - place.extra_tokens
    return Sequences.full(hidden.shape[0], length, length).with_extra_tokens(place.extra_tokens)


def _positions(request: Any, hidden: Any) -> int:
    """Positions, past ones included, that a layer's distances may span."""
    return request.key_offset + request.shape[-1] if isinstance(request, MaskRequest) else int(hidden.shape[1])
