"""Which pattern runs in which layer: what the user writes, the normal form, and what ``config.json`` holds.

The normal form is ``{stack: {layer: entry}}`` with stacks "encoder" and "decoder", and "vision" and "audio" where such
towers get patterns; an entry is a config, or ``{"heads": {"0-5": config, ...}}``. Layers not listed are dense.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import sa_hf.patterns  # noqa: F401  (registers the patterns that a config names)
from sa_hf.config import CONFIG_VERSION, SparseAttentionConfig, check_fields, pattern_class
from sa_hf.errors import ConfigVersionError, SparseAttentionError
from sa_hf.hf.state.towers import TOWERS
from sa_hf.patterns.dense import DenseAttentionConfig

STACKS = ("encoder", "decoder", *TOWERS)
# What stands for the stacks of a model that are no tower.
LANGUAGE = "language"
HEADS = "heads"

HeadsEntry: TypeAlias = dict[str, dict[str, SparseAttentionConfig]]
LayerEntry: TypeAlias = "SparseAttentionConfig | HeadsEntry"
Assignment: TypeAlias = dict[str, dict[int, LayerEntry]]
# stack -> number of query heads of each of its layers, in order
StackShapes: TypeAlias = Mapping[str, Sequence[int]]


def parse_assignment(
    pattern: Any,
    stacks: StackShapes,
    *,
    towers: StackShapes | None = None,
    refused: Mapping[str, str] | None = None,
    layers: str | int | Iterable[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Assignment:
    """What ``patch_model`` was given, as the normal form.

    Args:
        pattern: a name, a config, a mapping of layer ranges, ``{"encoder": ..., "decoder": ...}``, ``{"heads": ...}``;
            inside, a config may be a mapping of its fields with its ``name``, as YAML holds it.
        stacks: the model's stacks of language and the query heads of each layer.
        towers: likewise those that get a pattern only where the mapping names them.
        refused: stacks that can get none, and why.
        layers: "0-3,6", a number, or a list of numbers; None is every layer.
        options: fields of the config.

    Raises:
        SparseAttentionError: an unknown name or field, a range that overlaps another or matches no layer, or ``layers``
            or options beside a mapping.
    """
    options = dict(options or {})
    pattern = with_configs(pattern)
    if not isinstance(pattern, Mapping):
        config = make_config(pattern, options)
        return {stack: _filled(_where(layers, len(heads), stack), config) for stack, heads in stacks.items()}
    if layers is not None or options:
        beside = f"layers={layers!r}" if layers is not None else f"the options {sorted(options)}"
        raise SparseAttentionError(
            f"{beside} stand beside a mapping, which already says what each layer gets; put them into its configs"
        )
    if not pattern:
        raise SparseAttentionError('the mapping is empty; give e.g. {"0-3": "dense", "4-": config}')
    named = [key for key in pattern if key in (*STACKS, LANGUAGE)]
    if not named:
        return {stack: _parse_stack(pattern, heads, stack) for stack, heads in stacks.items()}
    if len(named) != len(pattern):
        others = [key for key in pattern if key not in named]
        raise SparseAttentionError(
            f"the mapping mixes stacks {named} with {others}; nest the others, e.g. {{'decoder': {{'0-3': ...}}}}"
        )
    towers = towers or {}
    _check_named(named, stacks, towers, refused or {})
    by_stack = {**dict.fromkeys(stacks, pattern.get(LANGUAGE, "dense")), **pattern}
    result: Assignment = {}
    for stack, heads in {**stacks, **{name: towers[name] for name in towers if name in named}}.items():
        chosen = by_stack[stack]
        inner = chosen if isinstance(chosen, Mapping) else {f"0-{len(heads) - 1}": chosen}
        result[stack] = _parse_stack(inner, heads, stack)
    return result


def _check_named(named: list[str], stacks: StackShapes, towers: StackShapes, refused: Mapping[str, str]) -> None:
    twice = [key for key in named if key in stacks]
    if LANGUAGE in named and twice:
        raise SparseAttentionError(
            f"{LANGUAGE!r} stands for all of {sorted(stacks)} and {twice[0]!r} is among them; name each stack once"
        )
    for key in named:
        if key in refused:
            raise SparseAttentionError(f"the stack {key!r} cannot get a pattern: {refused[key]}; leave it out")
        if key not in stacks and key not in towers and key != LANGUAGE:
            others = "".join(f"; {name!r} cannot get a pattern: {reason}" for name, reason in refused.items())
            raise SparseAttentionError(
                f"the model has no {key!r} stack; its stacks: {[*sorted(stacks), *towers]}{others}"
            )


def with_configs(value: Any) -> Any:
    """A pattern with its configs built: mappings with a ``name``, as YAML and JSON hold configs, at any depth."""
    if not isinstance(value, Mapping):
        return value
    if "name" in value:
        return SparseAttentionConfig.from_dict(dict(value))
    return {key: with_configs(inner) for key, inner in value.items()}


def make_config(pattern: Any, options: Mapping[str, Any] | None = None) -> SparseAttentionConfig:
    """A config from a pattern's name or a config, with fields replaced by ``options``."""
    options = dict(options or {})
    if isinstance(pattern, SparseAttentionConfig):
        cls = type(pattern)
    elif isinstance(pattern, str):
        cls = pattern_class(pattern)
    else:
        raise SparseAttentionError(
            f"a pattern is a name, a config or a mapping, not {pattern!r} ({type(pattern).__name__}); e.g. 'bigbird'"
        )
    check_fields(cls, options)
    if isinstance(pattern, SparseAttentionConfig):
        return dataclasses.replace(pattern, **options) if options else pattern
    return cls(**options)


def parse_indices(spec: Any, count: int, what: str) -> tuple[int, ...]:
    """The indices that "0-3,6", "4-", a number or a list of numbers names, ascending.

    Args:
        count: how many there are; an open range ends at ``count - 1``.
        what: "layer" or "head", for the message.

    Raises:
        SparseAttentionError: not a range, an index outside ``[0, count)``, a range that matches nothing, or a repeat.
    """
    if isinstance(spec, bool) or not isinstance(spec, str | int | Iterable):
        raise SparseAttentionError(f"{what}s={spec!r} must be a range such as '0-3,6' or '4-', or a list of numbers")
    found: list[int] = []
    spec = spec if isinstance(spec, str | int) else list(spec)
    for piece in _pieces(spec):
        found.extend(_piece(piece, count, what, spec))
    if not found:
        raise SparseAttentionError(f"{what}s={spec!r} names no {what}; the model has {what}s 0 to {count - 1}")
    repeated = sorted({i for i in found if found.count(i) > 1})
    if repeated:
        raise SparseAttentionError(f"{what}s={spec!r} names {what} {repeated[0]} twice; name each once")
    return tuple(sorted(found))


def _pieces(spec: Any) -> list[Any]:
    return spec.split(",") if isinstance(spec, str) else [spec] if isinstance(spec, int) else spec


def _piece(piece: Any, count: int, what: str, spec: Any) -> range:
    if isinstance(piece, int) and not isinstance(piece, bool):
        first = last = piece
    else:
        match = re.fullmatch(r"\s*(\d+)\s*(-?)\s*(\d*)\s*", piece) if isinstance(piece, str) else None
        if match is None or (match[3] and not match[2]):
            raise SparseAttentionError(
                f"{piece!r} in {what}s={spec!r} is no {what} range; write '3', '0-3', '4-', or join them as '0-3,6'"
            )
        first = int(match[1])
        last = int(match[3]) if match[3] else (count - 1 if match[2] else first)
        if match[3] and last < first:
            raise SparseAttentionError(f"{what} range {piece!r} runs backwards; write '{last}-{first}'")
    if not 0 <= first < count or last >= count:
        raise SparseAttentionError(
            f"{what}s={spec!r} reaches {what} {first if not 0 <= first < count else last}, "
            f"but there are {what}s 0 to {count - 1} only; nearest: {_nearest(spec, count)!r}"
        )
    return range(first, last + 1)


def _nearest(spec: Any, count: int) -> str:
    """What is left of indices, some out of range, with each of those moved to the nearest one there is."""
    found: set[int] = set()
    for piece in _pieces(spec):
        ends = [piece, piece] if isinstance(piece, int) else [int(x) for x in re.findall(r"\d+", str(piece))]
        if ends:
            first, last = ends[0], count - 1 if str(piece).strip().endswith("-") else ends[-1]
            found.update(range(max(0, min(first, count - 1)), max(0, min(last, count - 1)) + 1))
    return format_indices(sorted(found))


def format_indices(indices: Sequence[int]) -> str:
    """``(0, 1, 2, 6)`` as "0-2,6"."""
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _where(layers: Any, count: int, stack: str) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(count))
    try:
        return parse_indices(layers, count, "layer")
    except SparseAttentionError as error:
        raise SparseAttentionError(f"{stack}: {error}") from None


def _parse_stack(mapping: Mapping[Any, Any], heads: Sequence[int], stack: str) -> dict[int, LayerEntry]:
    """``{"0-3": ..., "4-": ...}`` or ``{"heads": ...}`` for one stack."""
    if HEADS in mapping:
        if len(mapping) > 1:
            others = [key for key in mapping if key != HEADS]
            raise SparseAttentionError(
                f"'heads' stands beside {others}; nest it by layer: {{'0-3': {{'heads': ...}}, '4-': ...}}"
            )
        return {layer: _heads_entry(mapping[HEADS], count) for layer, count in enumerate(heads)}
    result: dict[int, LayerEntry] = {}
    named: dict[int, Any] = {}
    for key, value in mapping.items():
        for layer in _where(key, len(heads), stack):
            if layer in named:
                raise SparseAttentionError(
                    f"{stack} layer {layer} is in both {named[layer]!r} and {key!r}; ranges must not overlap"
                )
            named[layer] = key
            if isinstance(value, Mapping):
                if set(value) != {HEADS}:
                    raise SparseAttentionError(
                        f"{stack} layers {key!r} map to {dict(value)!r}; a layer takes a name, a config or "
                        "{'heads': {...}}"
                    )
                result[layer] = _heads_entry(value[HEADS], heads[layer])
            else:
                result.update(_filled((layer,), make_config(value)))
    return dict(sorted(result.items()))


def _filled(layers: Iterable[int], config: SparseAttentionConfig) -> dict[int, LayerEntry]:
    """Layers with one config; plain dense ones need no entry."""
    return {} if config == DenseAttentionConfig(seed=config.seed) else dict.fromkeys(layers, config)


def _heads_entry(mapping: Any, num_heads: int) -> LayerEntry:
    """``{"0-5": config}`` over heads, with the heads that are not listed dense."""
    if not isinstance(mapping, Mapping) or not mapping:
        raise SparseAttentionError(
            f"'heads' maps head ranges to patterns, e.g. {{'0-5': config, '6-': 'dense'}}, not {mapping!r}"
        )
    entry: dict[str, SparseAttentionConfig] = {}
    named: dict[int, Any] = {}
    for key, value in mapping.items():
        indices = parse_indices(key, num_heads, "head")
        for head in indices:
            if head in named:
                raise SparseAttentionError(
                    f"head {head} is in both {named[head]!r} and {key!r}; ranges must not overlap"
                )
            named[head] = key
        entry[format_indices(indices)] = _head_config(value, key)
    rest = [head for head in range(num_heads) if head not in named]
    if rest:
        entry[format_indices(rest)] = DenseAttentionConfig()
    if len(entry) == 1:
        return next(iter(entry.values()))
    return {HEADS: entry}


def _head_config(value: Any, key: Any) -> SparseAttentionConfig:
    config = make_config(value)
    reason = None
    if config.extra_tokens:
        reason = f"adds {config.extra_tokens} extra tokens to the whole sequence"
    elif getattr(config, "conv_kernel_size", 1) > 1:
        reason = f"changes the layer's projections (conv_kernel_size={config.conv_kernel_size})"  # type: ignore[attr-defined]
    elif getattr(config, "shared_qk", False):
        reason = "changes the layer's projections (shared_qk=True)"
    if reason is not None:
        raise SparseAttentionError(
            f"pattern {config.name!r} on heads {key!r} {reason}, which single heads cannot; give it a whole layer"
        )
    return config


# -- config.json ---------------------------------------------------------------------------------------------------


def assignment_to_dict(assignment: Assignment) -> dict[str, Any]:
    """The value of ``"sa_hf"`` in ``config.json``."""
    layers = {
        stack: {str(layer): _entry_to_dict(entry) for layer, entry in entries.items()}
        for stack, entries in assignment.items()
    }
    return {"version": CONFIG_VERSION, "layers": layers}


def _entry_to_dict(entry: LayerEntry) -> dict[str, Any]:
    if isinstance(entry, SparseAttentionConfig):
        return entry.to_dict()
    return {HEADS: {heads: config.to_dict() for heads, config in entry[HEADS].items()}}


def assignment_from_dict(data: Any) -> Assignment:
    """Rebuild an assignment from ``config.json``; it may come from anywhere, so every part of it is checked.

    Raises:
        ConfigVersionError: a newer version, or keys that this version does not know.
        SparseAttentionError: anything else that is no assignment.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("layers"), Mapping):
        raise SparseAttentionError(
            f"'sa_hf' in config.json must be {{'version': ..., 'layers': {{...}}}}, not {data!r}"
        )
    version, unknown = data.get("version"), sorted(str(k) for k in data if k not in ("version", "layers"))
    if isinstance(version, bool) or not isinstance(version, int) or version > CONFIG_VERSION or unknown:
        raise ConfigVersionError(
            f"'sa_hf' in config.json has version {version!r}"
            + (f" and the unknown keys {unknown}" if unknown else "")
            + f"; this sa_hf reads versions up to {CONFIG_VERSION}: update it (`git pull`, then `pip install .`)"
        )
    result: Assignment = {}
    for stack, entries in data["layers"].items():
        if stack not in STACKS or not isinstance(entries, Mapping):
            raise SparseAttentionError(f"'sa_hf' in config.json has layers of {stack!r}; stacks are {list(STACKS)}")
        result[stack] = {_layer_number(layer): _entry_from_dict(entry) for layer, entry in entries.items()}
    return result


def _layer_number(layer: Any) -> int:
    if not str(layer).isdecimal():
        raise SparseAttentionError(f"'sa_hf' in config.json names layer {layer!r}; layers are numbers")
    return int(layer)


def _entry_from_dict(entry: Any) -> LayerEntry:
    if isinstance(entry, Mapping) and HEADS in entry:
        heads = entry[HEADS]
        if len(entry) > 1 or not isinstance(heads, Mapping) or not heads:
            raise SparseAttentionError(
                f"'heads' in config.json must map head ranges to configs and stand alone, not {entry!r}"
            )
        return {
            HEADS: {str(key): _head_config(SparseAttentionConfig.from_dict(value), key) for key, value in heads.items()}
        }
    return SparseAttentionConfig.from_dict(entry)


def check_assignment(assignment: Assignment, stacks: StackShapes) -> None:
    """Raise ``SparseAttentionError`` where an assignment (of a checkpoint) does not fit a model's stacks."""
    for stack, entries in assignment.items():
        if stack not in stacks:
            raise SparseAttentionError(f"the assignment names stack {stack!r}; the model's stacks: {sorted(stacks)}")
        for layer, entry in entries.items():
            if layer >= len(stacks[stack]):
                raise SparseAttentionError(
                    f"the assignment names {stack} layer {layer}; the model has layers 0 to {len(stacks[stack]) - 1}"
                )
            if not isinstance(entry, SparseAttentionConfig):
                _check_heads(entry[HEADS], stacks[stack][layer], f"{stack} layer {layer}")


def _check_heads(heads: Mapping[str, SparseAttentionConfig], num_heads: int, where: str) -> None:
    listed = [head for key in heads for head in parse_indices(key, num_heads, "head")]
    if sorted(listed) != list(range(num_heads)):
        raise SparseAttentionError(
            f"{where}: the head ranges {list(heads)} must name each of heads 0 to {num_heads - 1} once"
        )
