"""The model classes that the auto classes of the installed Transformers name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import transformers
from transformers.models.auto import configuration_auto, modeling_auto

# The order in which the auto classes are gone through: a class is listed under the first that names it.
FIRST = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


@dataclass(frozen=True)
class Entry:
    """One model class: its name, its ``model_type``, the auto class that loads it."""

    name: str
    model_type: str
    auto: str

    @property
    def is_base(self) -> bool:
        """Whether it is the body that the heads of its ``model_type`` stand on."""
        return self.auto == "AutoModel"

    @property
    def cls(self) -> Any:
        folder = f"transformers.models.{configuration_auto.model_type_to_module_name(self.model_type)}"
        found = getattr(transformers, self.name, None) or getattr(import_module(folder), self.name, None)
        # One that its package does not export (the text model of Voxtral's stream).
        return found or getattr(import_module(f"{folder}.modeling_{folder.rpartition('.')[2]}"), self.name)

    @property
    def config_class(self) -> Any:
        own = getattr(self.cls, "config_class", None)
        return own or getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[self.model_type])


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """Every class once: bodies first, then heads, by ``model_type``."""
    found: dict[str, Entry] = {}
    for auto, model_type, name in _named():
        entry = found.setdefault(name, Entry(name, model_type, auto))
        # Several types may name one class (GPT-SW3 is a GPT-2): it goes by its own name.
        if entry.auto == auto and _is_of(name, model_type) and not _is_of(name, entry.model_type):
            found[name] = Entry(name, model_type, auto)
    return tuple(sorted(found.values(), key=lambda entry: (entry.model_type, not entry.is_base, entry.name)))


def _is_of(name: str, model_type: str) -> bool:
    return name.lower().startswith(model_type.replace("_", "").replace("-", "").lower())


def _named() -> Iterator[tuple[str, str, str]]:
    mappings = {
        name: mapping._model_mapping  # names, of the lazy mapping to classes
        for name, auto in vars(modeling_auto).items()
        if isinstance(auto, type) and (mapping := getattr(auto, "_model_mapping", None)) is not None
    }
    for auto in sorted(mappings, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        for model_type, named in mappings[auto].items():
            for name in named if isinstance(named, tuple | list) else [named]:
                if name is not None:
                    yield auto, model_type, name
