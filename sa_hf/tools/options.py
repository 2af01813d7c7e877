"""Configurations of the command line: a pattern's name, a preset, and its fields as ``--set field=value``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from sa_hf.config import SparseAttentionConfig, check_fields, did_you_mean, pattern_class
from sa_hf.errors import SparseAttentionError

SHARED = {f.name for f in dataclasses.fields(SparseAttentionConfig)}  # fields that every pattern has


def parse_value(text: str) -> Any:
    """A flag's value: JSON (numbers, true, null, lists), a sequence as ``1,2`` or ``(1, 2)``, else the text itself."""
    items = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    # A sequence of one is written "(1,)" in Python and "1," in haste.
    for candidate in (text, f"[{items.removesuffix(',')}]" if "," in text else text):
        try:
            value = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        return tuple(value) if isinstance(value, list) else value
    return {"None": None, "True": True, "False": False}.get(text, text)


def parse_options(pairs: Sequence[str], config: type[SparseAttentionConfig] | None = None) -> dict[str, Any]:
    """``["window=512", ...]`` as a dict.

    Args:
        config: the class whose fields they are, for the error texts.

    Raises:
        SparseAttentionError: an entry without "=" or without a value, a name given twice or, of ``config``, no field.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = (part.strip() for part in pair.partition("="))
        if not separator or not name or not value:
            raise SparseAttentionError(f"--set {pair!r} must have the form field=value{_fields_to_set(name, config)}")
        if name in options:
            raise SparseAttentionError(f"--set {name} is given twice, as {options[name]!r} and {value}; give it once")
        options[name] = parse_value(value)
    if config is not None:
        check_fields(config, options)
    return options


def _fields_to_set(name: str, config: type[SparseAttentionConfig] | None) -> str:
    if config is None:
        return ", e.g. window=512"
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    example = name if name in fields else next((f for f in fields if f not in SHARED), "seed")
    default = fields[example]
    typed = ",".join(str(v) for v in default) if isinstance(default, tuple) else default
    return f", e.g. {example}={typed}{did_you_mean(name, fields)}; fields: {sorted(fields)}"


def described_pattern(value: Any) -> Any:
    """A pattern as JSON and YAML hold it, which ``patch_model`` takes."""
    if isinstance(value, SparseAttentionConfig):
        return value.to_dict()
    return {key: described_pattern(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def make_config(pattern: str, pairs: Sequence[str] = (), preset: str | None = None) -> SparseAttentionConfig:
    """A configuration from a pattern's name, an optional preset and ``field=value`` options."""
    cls = pattern_class(pattern)
    options = parse_options(pairs, cls)
    try:
        if preset is not None:
            return cls.preset(preset, **options)
        return cls(**options)
    except SparseAttentionError as error:
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls)}
        sequences = [name for name in options if isinstance(defaults.get(name), tuple)]
        if not sequences:
            raise
        # The pattern's own example is Python, whose parentheses and blanks a shell does not pass on.
        typed = " ".join(f"{name}={','.join(str(v) for v in defaults[name][:2])}" for name in sequences)
        raise SparseAttentionError(f"{error}. On the command line a sequence is typed so: {typed}") from error
