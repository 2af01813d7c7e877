"""What a configuration class says of itself: the paper, and its fields with type, default and meaning."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass

from sa_hf.config import SparseAttentionConfig
from sa_hf.patterns.base import StaticPatternConfig


@dataclass(frozen=True)
class Field:
    """One field of a configuration: its type as written, its default as Python shows it, and what it means."""

    name: str
    type: str
    default: str
    meaning: str


def fields_of(config: type[SparseAttentionConfig]) -> list[Field]:
    """The fields of a class in their order, the pattern's own before those that all patterns share."""
    meaning = argument_docs(config)
    shared = [f.name for f in dataclasses.fields(SparseAttentionConfig)]
    found = [Field(f.name, str(f.type), repr(f.default), meaning.get(f.name, "")) for f in dataclasses.fields(config)]
    return sorted(found, key=lambda field: field.name in shared)


def paper_of(config: type[SparseAttentionConfig]) -> str:
    """The first sentence of the pattern's module: what it is, and the paper."""
    text = (sys.modules[config.__module__].__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(text.split())


def kind_of(config: type[SparseAttentionConfig]) -> str:
    """ "static", where a mask follows from the configuration alone, else "learned": from training or data."""
    return "static" if issubclass(config, StaticPatternConfig) else "learned"


def argument_docs(config: type[SparseAttentionConfig]) -> dict[str, str]:
    """What the "Args:" sections of a class and of the base say of each field, without the final full stop."""
    found: dict[str, str] = {}
    for cls in (SparseAttentionConfig, config):
        for names, text in _arguments(inspect.cleandoc(cls.__doc__ or "")):
            for name in names:
                if name in config.__dataclass_fields__:
                    found[name] = text.removesuffix(".")
    return found


def _arguments(doc: str) -> list[tuple[list[str], str]]:
    """The entries of an "Args:" section: an entry begins in the section's own indentation, and nowhere else."""
    entries: list[tuple[list[str], str]] = []
    for line in doc.partition("\nArgs:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        begin = re.match(r" {4}((?:\w+, )*\w+): (.*)", line)
        if begin:
            entries.append((begin.group(1).split(", "), begin.group(2)))
        elif line.strip() and entries:
            names, text = entries[-1]
            entries[-1] = (names, f"{text} {line.strip()}")
    return entries
