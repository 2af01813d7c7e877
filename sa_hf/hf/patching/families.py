"""Where a model's attention is: its stacks of self-attention, its cross-attention, and the shape of each layer.

Nothing here names a model but BigBird (``switch_over``; others are in ``asking.py``). An attention module can be
replaced when its ``forward`` asks transformers' ``AttentionInterface`` for the function to call; what it is called with
is then checked by the probe.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from sa_hf.errors import UnsupportedModelError
from sa_hf.hf.patching.asking import let_ask, let_ask_no_more
from sa_hf.hf.patching.unreached import computes_itself, two_stacks
from sa_hf.hf.state.positions import position_limit
from sa_hf.hf.state.sites import Left, Site, Sites, computes_in, window_band
from sa_hf.hf.state.towers import TOWERS, tower_of
from sa_hf.layer import LayerSpec
from sa_hf.ops.parts import Band

# The attribute names under which decoders keep attention over the encoder's output.
CROSS_NAMES = {"encoder_attn", "crossattention", "EncDecAttention", "cross_attn", "cross_attention"}
# Of a layer that joins the encoder's keys to its own and does not ask (T5Gemma 2's decoder in older releases).
_MERGED = "merged_attention_mask"
_MERGES = "its layers read their own tokens and the encoder's in one softmax"
# Kinds of layers in a config that have its window.
_SLIDING = ("sliding_attention", "hybrid_sliding")
# The functions of Transformers that make masks, and whether causal ones.
_MASKS = {
    "create_causal_mask": True, "create_sliding_window_causal_mask": True, "create_chunked_causal_mask": True,
    "create_bidirectional_mask": False, "create_bidirectional_sliding_window_mask": False,
}  # fmt: skip
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
# Of queries and keys: the head_dim of a config with latent attention is that of the rotary part.
_HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def calls_interface(module: nn.Module) -> bool:
    """Whether the module's ``forward`` looks its attention function up in transformers' interface."""
    if getattr(type(module), "asks_interface", False):
        return True
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def find_sites(model: PreTrainedModel, max_length: int | None = None) -> Sites:
    """The attention layers of a model, described for inputs up to ``max_length`` (None: the model's limit).

    Of a multimodal model the language stack alone is among the stacks; its towers stand beside. Leaves the model as
    it is.

    Raises:
        UnsupportedModelError: no attention goes through the interface, or there are two stacks of one kind.
    """
    switched = switch_over(model)
    try:
        return _sites(model, max_length)
    finally:
        if switched:
            switch_back(model)


_Layers: TypeAlias = "list[tuple[str, nn.Module]]"


def _sites(model: PreTrainedModel, max_length: int | None) -> Sites:
    found: dict[str, _Layers] = {}
    merged: dict[str, _Layers] = {}
    cross: list[str] = []
    for name, module in model.named_modules():
        if not calls_interface(module):
            continue
        if _is_cross(name, module):
            cross.append(name)
        elif _MERGED in inspect.signature(type(module).forward).parameters:
            merged.setdefault(_stack_path(name), []).append((name, module))
        else:
            found.setdefault(_stack_path(name), []).append((name, module))
    kinds = {path: tower_of(model, path) for path in found}
    language = {path: layers for path, layers in found.items() if kinds[path] is None}
    if not language and merged:
        raise UnsupportedModelError(f"{type(model).__name__} gets no pattern: {_MERGES}")
    if not language:
        raise UnsupportedModelError(computes_itself(model, _language_part(model, found)))
    limit = position_limit(model) if max_length is None else max_length
    recorded = _recorded_layers(model)

    def described(layers: _Layers, stack: str, limit: int | None) -> list[Site]:
        causal = _is_causal(model, layers)
        return [
            Site(name, _block(model, name, recorded), stack, _layer_spec(module, index, len(layers), limit, causal))
            for index, (name, module) in enumerate(layers)
        ]

    chosen, left = _language_stacks(model, language)
    stacks = {stack: described(layers, stack, limit) for stack, layers in chosen.items()}
    left.update(_halves_left(model, stacks, merged))
    towers: dict[str, list[Site]] = {}
    for kind in TOWERS:
        paths = sorted((path for path in found if kinds[path] == kind), key=lambda path: -len(found[path]))
        for path in paths:
            name, layers = (kind if path == paths[0] else path), found[path]
            reason = None if name == kind else f"beside the larger {kind} stack {paths[0]!r}"
            try:
                if reason is None:
                    towers[name] = described(layers, name, None)
            except UnsupportedModelError as error:
                reason = str(error)
            left[name] = Left(path, tuple(layer for layer, _ in layers), reason)
    return Sites(dict(sorted(stacks.items(), reverse=True)), cross, towers, left)


def _language_part(model: PreTrainedModel, found: dict[str, _Layers]) -> str:
    name = type(model).__name__
    return f"the language model of {name}" if found else name


def _language_stacks(model: PreTrainedModel, found: dict[str, _Layers]) -> tuple[dict[str, _Layers], dict[str, Left]]:
    """The stacks "encoder" and "decoder" of those that are no tower, in the model where the token embedding is; others
    (a resampler between tower and language, an adapter or predictor behind a longer encoder) are left.

    Raises:
        UnsupportedModelError: there are two of one kind.
    """
    by_kind: dict[str, dict[str, _Layers]] = {}
    for path, layers in found.items():
        by_kind.setdefault("decoder" if _is_causal(model, layers) else "encoder", {})[path] = layers
    chosen: dict[str, _Layers] = {}
    left: dict[str, Left] = {}
    several = any(len(paths) > 1 for paths in by_kind.values())
    # An encoder-decoder may keep its embedding in one half.
    around = _around_embedding(model) if several or not model.config.is_encoder_decoder else ""
    within = {kind: [path for path in paths if f"{path}.".startswith(around)] for kind, paths in by_kind.items()}
    for kind, paths in by_kind.items():
        inside = within[kind]
        if not inside and model.config.is_encoder_decoder:  # the embedding is the other half's
            inside = list(paths)
        inside = _outermost(model, inside)
        # Attention beside the layers, of no list of them (Inkling 2 reads the outputs of its layers by one).
        inside = [path for path in inside if found[path][0][0] != path] or inside
        longest = max((len(paths[path]) for path in inside), default=0)
        inside = [path for path in inside if len(paths[path]) == longest]
        if len(inside) > 1 or (len(paths) > 1 and not any(within.values())):
            raise UnsupportedModelError(two_stacks(model, kind, *list(paths)[:2]))
        for path, layers in paths.items():
            if path in inside:
                chosen[kind] = layers
            else:
                reason = "it is no part of the language model, where the token embedding is"
                if inside and path in within[kind]:
                    reason = f"it is beside the larger {kind} stack {inside[0]!r}"
                left[path] = Left(path, tuple(name for name, _ in layers), reason)
    return chosen, left


def _outermost(model: PreTrainedModel, paths: list[str]) -> list[str]:
    """Of several stacks those that the fewest models are around: the others belong to models within (the units that a
    translation is spoken by, SeamlessM4T)."""

    def depth(path: str) -> int:
        parts = path.split(".")
        outer = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
        return sum(isinstance(module, PreTrainedModel) for module in outer)

    depths = {path: depth(path) for path in paths}
    return [path for path in paths if depths[path] == min(depths.values())]


def _around_embedding(model: PreTrainedModel) -> str:
    """The name, with a dot behind, of the innermost model around the token embedding; "" where that is the whole."""
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return ""
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    while name:
        name = name.rpartition(".")[0]
        if name and isinstance(model.get_submodule(name), PreTrainedModel):
            return f"{name}."
    return ""


def _halves_left(model: PreTrainedModel, stacks: Iterable[str], merged: dict[str, _Layers]) -> dict[str, Left]:
    """The half of an encoder-decoder that no pattern reaches, "encoder" or "decoder"."""
    body = model.base_model
    halves = {stack: getattr(body, stack, None) for stack in ("encoder", "decoder")}
    if not all(isinstance(half, nn.Module) for half in halves.values()):
        return {}
    names = {half: name for name, half in model.named_modules() if half in halves.values()}
    left: dict[str, Left] = {}
    for stack, half in halves.items():
        name = names[half]
        if stack in stacks or tower_of(model, name) or not _has_attention(half):
            continue
        layers = [layer for path in merged if f"{path}.".startswith(f"{name}.") for layer, _ in merged[path]]
        reason = (
            _MERGES
            if layers
            else "it computes its attention itself instead of asking transformers' AttentionInterface for it"
        )
        left[stack] = Left(name, tuple(layers), reason, half=name)
    return left


def _has_attention(half: Any) -> bool:
    """Whether a half has any attention: a transducer's decoder is an LSTM."""
    return any("ttention" in type(module).__name__ for module in half.modules())


def switch_over(model: nn.Module) -> bool:
    """Let attention that computes the same as the interface's ask the interface (BigBird's own architecture); returns
    whether any had to be changed for it."""
    changed = let_ask(model)
    if not _has_bigbird(model):
        return changed
    # Late: it loads Transformers' BigBird.
    from sa_hf.hf.patching.big_bird import ask_interface

    return ask_interface(model) or changed


def switch_back(model: nn.Module) -> None:
    """Undo :func:`switch_over`."""
    let_ask_no_more(model)
    if _has_bigbird(model):
        from sa_hf.hf.patching.big_bird import ask_no_more  # late, as above

        ask_no_more(model)


def _has_bigbird(model: nn.Module) -> bool:
    return any(type(module).__name__ == "BigBirdAttention" for module in model.modules())


def _stack_path(name: str) -> str:
    """The name up to the list of layers: ``model.layers`` of ``model.layers.3.self_attn``."""
    return re.split(r"\.\d+(?:\.|$)", name, maxsplit=1)[0]


def _block(model: nn.Module, name: str, recorded: tuple[type, ...]) -> str:
    """The name of the layer around an attention module: what the model records hidden states of, else its place in
    the first list (``encoder.block.3`` of ``encoder.block.3.layer.0.SelfAttention``)."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        outer = ".".join(parts[:end])
        if isinstance(model.get_submodule(outer), recorded):
            return outer
    match = re.match(r".*?\.\d+(?=\.|$)", name)
    return match[0] if match else name


def _recorded_layers(model: PreTrainedModel) -> tuple[type, ...]:
    """The classes whose outputs Transformers records as hidden states."""
    found: list[type] = []
    for module in model.modules():
        specs = getattr(type(module), "_can_record_outputs", None) or {}
        listed = specs.get("hidden_states", ())
        for spec in listed if isinstance(listed, list | tuple) else [listed]:
            target = getattr(spec, "target_class", spec)
            if isinstance(target, type):
                found.append(target)
    return tuple(found)


def _is_cross(name: str, module: nn.Module) -> bool:
    named = not CROSS_NAMES.isdisjoint(name.split(".")) or "Cross" in type(module).__name__
    return named or bool(getattr(module, "is_cross_attention", False))


def _is_causal(model: nn.Module, layers: _Layers) -> bool:
    """Whether a stack is causal: by its modules, or, where they do not say it, by the masks that the models around
    them make (PaliGemma, whose modules are not for the sake of its prefix)."""
    name, module = layers[0]
    if not getattr(_config(module), "is_causal", True):
        return False
    if getattr(module, "is_causal", False):
        return True
    parts = name.split(".")
    for end in range(len(parts)):
        around = model.get_submodule(".".join(parts[:end]))
        code = getattr(inspect.unwrap(type(around).forward), "__code__", None)
        made = [_MASKS[called] for called in ([] if code is None else code.co_names) if called in _MASKS]
        if any(made) and type(around).__name__.endswith("Decoder"):  # the other is the encoder's
            return True
        if made:  # a union may take causality away (a bidirectional Gemma 3)
            return all(made) and code is not None and "or_mask_function" not in code.co_consts
    return False


def _config(module: nn.Module) -> Any:
    """The config of a layer: its own, where values differ from layer to layer (those of the whole raise)."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if getattr(config, "is_heterogeneous", False) and isinstance(index, int):
        return config.per_layer_config[index]  # type: ignore[union-attr]
    return config


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for source in (module, _config(module)):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _layer_spec(module: nn.Module, index: int, num_layers: int, limit: int | None, causal: bool) -> LayerSpec:
    heads = _first(module, _HEADS)
    # Zamba's attention reads twice the width of its residual stream.
    hidden = getattr(_config(module), "attention_hidden_size", None) or getattr(_config(module), "hidden_size", None)
    if heads is None or hidden is None:
        raise UnsupportedModelError(
            f"the number of heads or the hidden size of {type(module).__name__} is in none of the attributes {_HEADS} "
            "or config.hidden_size, so its layer cannot be described"
        )
    head_dim = _first(module, _HEAD_DIM) or hidden // heads
    groups = getattr(module, "num_key_value_groups", None)
    key_heads = heads // groups if isinstance(groups, int) and groups else getattr(module, "num_key_value_heads", heads)
    device, dtype = computes_in(module)
    return LayerSpec(
        layer_idx=index,
        num_layers=num_layers,
        num_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        causal=causal,
        max_length=limit,
        band=own_window(module, index, causal),
        chunk=own_chunk(module, index),
        device=device,
        dtype=dtype,
        sinks=isinstance(getattr(module, "sinks", None), nn.Parameter) or getattr(module, "has_sinks", False),
        terms=bool(getattr(module, "has_distance_terms", False)),
    )


def own_window(module: nn.Module, index: int, causal: bool) -> Band:
    """The model's own sliding window in this layer, as its mask function builds it; a chunk is one, too. ``index`` is
    its place among the attention layers, which a hybrid counts along with others."""
    config, kind = _config(module), _layer_type(module, index)
    window: Any = own_chunk(module, index)
    if window is None and kind in (None, *_SLIDING):
        window = getattr(config, "sliding_window", None) if kind or _makes_windows(module) else None
        window = getattr(module, "sliding_window", window)
        exclusive = not causal and "create_bidirectional_sliding_window_mask" in vars(
            sys.modules[type(module).__module__]
        )
        if exclusive and isinstance(window, int) and window == getattr(config, "sliding_window", None):
            window += 1  # T5Gemma's mask has as many on each side; ModernBERT's layers count themselves already
        if not causal and isinstance(window, int) and _halves_windows(module):
            return Band((window + 1) // 2 - 1, window // 2)
    elif window is None and kind != "full_attention":
        window = getattr(module, "sliding_window", None)
    return window_band(None if isinstance(window, bool) or not isinstance(window, int) else window, causal)


def _halves_windows(module: nn.Module) -> bool:
    """Whether the code of a model spreads a window over both sides (T5Gemma 2's encoder)."""
    function = getattr(sys.modules[type(module).__module__], "sliding_window_mask_function", None)
    return function is not None and "is_causal" in inspect.signature(function).parameters


def own_chunk(module: nn.Module, index: int) -> int | None:
    """The tokens of the chunks that this layer's mask is cut into, None where it is not."""
    chunk = getattr(_config(module), "attention_chunk_size", None)
    return chunk if isinstance(chunk, int) and _layer_type(module, index) == "chunked_attention" else None


def _layer_type(module: nn.Module, index: int) -> str | None:
    """What the config calls this layer; None where it tells no layers apart."""
    types = getattr(_config(module), "layer_types", None)
    own = getattr(module, "layer_idx", None)
    at = own if isinstance(own, int) and own >= 0 else index
    return None if types is None else types[at] if at < len(types) else ""


def _makes_windows(module: nn.Module) -> bool:
    """Whether the model's code has masks with windows at all: a config may say one that no mask has (Moshi)."""
    code = sys.modules[type(module).__module__]
    return any("sliding_window" in name for name in vars(code))
