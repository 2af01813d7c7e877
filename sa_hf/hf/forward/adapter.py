"""The one function that transformers calls in a patched model, and what it runs.

It works only through the ``sparse`` child that every attention module of a patched model has (a marker without
state where the layer stays dense) and raises where that is absent: a model that was loaded without its patterns
cannot run dense in silence.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.forward.convolution import ConvTaps
from sa_hf.hf.forward.indexed import with_chosen_keys
from sa_hf.hf.forward.joined import packed_mask, sparse_mask
from sa_hf.hf.forward.keys import check_reach, give_keys
from sa_hf.hf.forward.keywords import SINKS, TERMS, refuse_attentions, unknown_keywords
from sa_hf.hf.forward.layer_input import NO_CACHE_IN_GRAPHS, LayerCall
from sa_hf.hf.forward.masks import MaskRequest, check_no_past, said_ids, traced_sequences
from sa_hf.hf.forward.position_bias import expanded_bias, expanded_terms
from sa_hf.hf.forward.ready_masks import read_mask, sequences_twice
from sa_hf.hf.forward.repeated import repeated_step, settle_step
from sa_hf.hf.forward.rotary import before_rotary, turned_halves
from sa_hf.hf.state.activity import IMPLEMENTATION, PACKED, Place, place_of
from sa_hf.hf.state.inputs import ForwardInputs, handed_over
from sa_hf.hf.state.layers import active_child, leaves, remembers
from sa_hf.hf.state.recomputation import in_backward
from sa_hf.hf.state.sites import window_band
from sa_hf.hf.state.versions import tested_range
from sa_hf.layer import AttentionInputs, Blocks
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.parts import Band
from sa_hf.ops.sequences import Sequences, whole_rows
from sa_hf.patterns.base import StaticPatternConfig, default_scale
from sa_hf.patterns.learned import LearnedAttention


def register() -> None:
    """Make the adapter known to transformers; done at the first patch, never at import."""
    AttentionInterface.register(IMPLEMENTATION, sparse_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sparse_mask)
    AttentionInterface.register(PACKED, packed_attention_forward)
    AttentionMaskInterface.register(PACKED, packed_mask)


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
    child = active_child(module)
    ours = isinstance(child, SparseAttention) or place.extra_tokens
    if ours and place.spec is not None:
        ready = call.cut if attention_mask is None else attention_mask
        attention_mask = read_mask(ready, query, key, place.spec.causal, place.extra_tokens)
    if isinstance(attention_mask, Tensor) and ours:
        raise SparseAttentionError(
            f"a mask of shape {tuple(attention_mask.shape)} reached {type(module).__name__}; sparse attention takes a "
            "2-D mask [batch, length] (1 real, 0 padding), given to the model"
        )
    joined = attention_mask.joined if isinstance(attention_mask, MaskRequest) else None
    # A layer left dense takes the masks of its own tokens and of the encoder's as one.
    if joined is not None and (isinstance(joined, Tensor) or isinstance(child, SparseAttention)):
        what = "numbers" if isinstance(joined, Tensor) else "another mask"
        raise SparseAttentionError(
            f"the model joins {what} to the mask of {type(module).__name__}, which sparse attention does not know and "
            "would have to drop"
        )
    if not isinstance(child, SparseAttention):
        return _dense_forward(module, place, query, key, value, attention_mask, scaling, dropout, kwargs)
    request: MaskRequest | None = attention_mask
    said = _said(scaling, dropout, kwargs)
    if said is not None:
        out = repeated_step(module, child, place, call, (query, key, value), request, said)
        if out is not None:
            return out, None
    attend = _attend
    if call.memory is not None and torch.compiler.is_compiling():
        attend = _attend_uncompiled
    return attend(module, place, child, call, query, key, value, request, scaling, dropout, said, kwargs), None


# What a decoding step of a static pattern is told beside its tensors, its mask and what changes nothing here.
_OF_A_STEP = ("softcap", "sliding_window", "is_causal")


def _said(scaling: float | None, dropout: float, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """That, to be compared from layer to layer; None where a call is told more."""
    if dropout or torch.compiler.is_compiling() or any(kwargs.get(name) is not None for name in _MORE_SAID):
        return None
    return scaling, *(kwargs.get(name) for name in _OF_A_STEP), *kwargs


_MORE_SAID = ("position_bias", TERMS, SINKS, "sequence_ids", "cu_seq_lens_q", "output_attentions")


@with_host_defaults
def _attend(
    module: nn.Module, place: Place, child: SparseAttention, call: LayerCall, query: Tensor, key: Tensor, value: Tensor,
    request: MaskRequest | None, scaling: float | None, dropout: float, said: tuple[Any, ...] | None,
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """One layer's pattern: output ``[batch, queries, heads, head_dim]``."""
    inputs = _inputs_of(module, place, child, call, (query, key, value), request, scaling, dropout, kwargs)
    _place_in_forward(module, child, request)
    if call.memory is not None:
        call.memory.settle()
        inputs.key_slots = call.memory.kept_slots(inputs.sequences.key_length)
    if inputs.key_slots is None and request is not None and request.key_offset:
        check_reach(request, inputs.sequences, inputs.band)
    if place.spec is not None and not place.spec.causal and inputs.key_slots is None:
        check_no_past(key.shape[2], inputs.sequences.key_length)
    give_keys(child, inputs, request)
    out = _run(child, inputs)
    if said is not None and inputs.step is not None:
        settle_step(child, place, inputs, request, said)
    if call.memory is not None:
        call.memory.evict(child, inputs)
    conv = child._modules.get("conv")
    if isinstance(conv, ConvTaps):
        conv.forget()
    return out.transpose(1, 2).contiguous()


def _inputs_of(
    module: nn.Module, place: Place, child: SparseAttention, call: LayerCall, tensors: tuple[Tensor, Tensor, Tensor],
    request: MaskRequest | None, scaling: float | None, dropout: float, kwargs: dict[str, Any],
) -> AttentionInputs:  # fmt: skip
    """What a pattern is told of a layer's call: of all that the model said, or refused."""
    query, key, value = tensors
    bias = kwargs.pop("position_bias", None)
    query_term, key_term = kwargs.pop(TERMS, None) or (None, None)
    softcap = kwargs.pop("softcap", None)
    window = kwargs.pop("sliding_window", None)
    causal = kwargs.pop("is_causal", None)
    if causal is False and request is not None:  # its mask says it
        causal = None
    sinks = kwargs.pop(SINKS, None) if place.spec is not None and place.spec.sinks else None
    _refuse(module, kwargs)
    if call.memory is None and key.shape[2] > query.shape[2] and remembers(child):
        if request is not None and request.whole is not None:
            raise _last_tokens_alone(module, query.shape[2], key.shape[2])
        raise _no_memory(module, place, query.shape[2], key.shape[2])
    causal, band, chunk, blocks, sequences = _reach(module, place, query, key, request, window, causal, kwargs)
    if call.memory is None and not torch.compiler.is_compiling() and key.shape[2] > sequences.key_length:
        raise _keys_of_its_own(module, key.shape[2], sequences.key_length)
    if blocks is not None:
        _check_blocks(module, child, key, sequences)
    return AttentionInputs(
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
        sinks=sinks,
        query_term=query_term,
        key_term=key_term,
        chunk=chunk,
        blocks=blocks,
        hidden_states=call.hidden_states,
        before_rotary=partial(before_rotary, module, call.rotary),
        turned_halves=partial(turned_halves, module, call.rotary),
        remember=None if call.memory is None else call.memory.remember,
        beside=None if call.memory is None else call.memory.beside,
        noted=None if call.memory is None else {},
    )


def _place_in_forward(module: nn.Module, child: SparseAttention, request: MaskRequest | None) -> None:
    """Tell the layer's patterns how many forwards in training ago the running one began."""
    started = handed_over() if request is None else None if torch.compiler.is_compiling() else request.given
    for leaf in leaves(child):
        steps_back = _steps_back(module, leaf, started)
        if leaf.steps_back != steps_back:  # a module sets an attribute slowly
            leaf.steps_back = steps_back


def _reach(
    module: nn.Module, place: Place, query: Tensor, key: Tensor, request: MaskRequest | None, window: Any,
    causal: bool | None, kwargs: dict[str, Any],
) -> tuple[bool, Band, int | None, Blocks | None, Sequences]:  # fmt: skip
    """What a call may read, whatever its pattern: whether it is causal, the model's own window, chunks and blocks, and
    the sequences. ``window`` and ``causal`` are what the call said of them, None where it said nothing."""
    if request is not None and torch.compiler.is_compiling():
        causal = _causal_by_itself(module, place) if causal is None else causal
        band = window_band(window, causal) if place.spec is None else place.spec.band
        # What waits for the operator stands in for sequences: static patterns alone take it, the others raise.
        waiting = traced_sequences(request, place.activity.traced, causal, place.extra_tokens)
        # The mask function is then none of those that have chunks or blocks.
        return causal, band, None, None, cast(Sequences, waiting)
    if causal is None:
        causal = request.causal if request is not None else _causal_by_itself(module, place)
    sequences = _sequences(place, request, query, key, kwargs)
    if request is None:
        return causal, window_band(window, causal), None, None, sequences
    return causal, request.band, request.chunk, request.blocks, sequences


def _causal_by_itself(module: nn.Module, place: Place) -> bool:
    return bool(getattr(module, "is_causal", False)) if place.spec is None else place.spec.causal


def _check_blocks(module: nn.Module, child: SparseAttention, key: Tensor, sequences: Sequences) -> None:
    """That the pairs of an image's tokens can be added to the pattern in this call."""
    names = [leaf.config.name for leaf in leaves(child) if not isinstance(leaf.config, StaticPatternConfig)]
    reason = None
    if names:
        reason = f"{names[0]!r} chooses its pairs by what it has learned or by the data"
    elif sequences.extra_tokens:
        reason = "the pattern adds tokens of its own"
    elif key.shape[2] < sequences.key_length:
        reason = "the cache has dropped keys"
    if reason is not None:
        raise SparseAttentionError(
            f"in {type(module).__name__} the tokens of an image (or of a prefix) read each other, and these pairs "
            f"cannot be added to the pattern: {reason}. Give text alone, another pattern, or keep the layer dense"
        )


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


def _keys_of_its_own(module: nn.Module, keys: int, positions: int) -> SparseAttentionError:
    return SparseAttentionError(
        f"{type(module).__name__} attends {keys} keys for {positions} positions without a cache: it adds keys of its "
        "own, which no pattern names; keep the layer dense"
    )


def _last_tokens_alone(module: nn.Module, new: int, tokens: int) -> SparseAttentionError:
    return SparseAttentionError(
        f"layers of {type(module).__name__} that read the keys of others run the last {new} of {tokens} tokens alone "
        "(logits_to_keep), and the pattern there needs values of every token; call the model with logits_to_keep=0, or "
        "use a static pattern in these layers"
    )


def _sequences(
    place: Place, request: MaskRequest | None, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> Sequences:
    extra = place.extra_tokens
    ids, lengths = kwargs.get("sequence_ids"), kwargs.get("cu_seq_lens_q")
    if request is not None:
        if request.given is not None or (ids is None and lengths is None):
            return request.sequences(extra)
        if request.cuts:
            raise sequences_twice()
        ids = said_ids(ForwardInputs(ids, None, lengths), query.shape[0], request.query_length)
        return Sequences.from_mask(
            query.shape[0], request.query_length, request.query_length, request.padding, ids
        ).with_extra_tokens(extra)
    outer = handed_over()
    if ids is not None or lengths is not None or (outer is not None and outer.sequence_ids is not None):
        raise _without_mask()
    rows = whole_rows(query.shape[0], query.shape[2] - extra, key.shape[2] - extra, extra)
    return cast(Sequences, rows)


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
    module: nn.Module, place: Place, query: Tensor, key: Tensor, value: Tensor, mask: MaskRequest | Tensor | None,
    scaling: float | None, dropout: float, kwargs: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    """The original attention, with the mask that it would have got (or has got, ready-made)."""
    if kwargs.get("output_attentions"):
        refuse_attentions()
    request = mask if isinstance(mask, MaskRequest) else None
    if request is not None:
        mask = request.dense(place.original, place.extra_tokens, _given(place, request, kwargs))
    mask = with_chosen_keys(module, mask, query, key, kwargs)
    # Cross-attention computes its own bias, which is no table, and so do conformers.
    bias = kwargs.get("position_bias")
    if bias is not None and place.spec is not None and bias.shape[2:] != (query.shape[2], key.shape[2]):
        kwargs["position_bias"] = expanded_bias(kwargs["position_bias"], query, key, request, place.extra_tokens)
    if kwargs.get(TERMS) is not None:
        terms = expanded_terms(kwargs.pop(TERMS), query.shape[2], key.shape[2], place.extra_tokens)
        kwargs["position_bias"] = terms
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
