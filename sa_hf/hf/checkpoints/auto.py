"""How ``config.json`` says what loads a checkpoint: Auto classes, and the remedy where they are not used."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from sa_hf.hf.checkpoints.files import REMOTE_FILE

CONFIG_KEY = "sa_hf"
# What a patched model's config holds beside its architecture's own fields.
CONFIG_FIELDS = (CONFIG_KEY, "auto_map", "attn_implementation")
# Read by a load without our code, whose error then shows it; nobody registers a function under a name that begins so.
REMEDY = "sa_hf: load with "
# Of several Auto classes that give a class, the ones that its users know first, and those that stand for others last.
_BEST_KNOWN = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_LEAST_KNOWN = ("AutoModelForPreTraining", "AutoModelWithLMHead", "AutoBackbone")
# No "/" in it: that has Transformers look for a kernel on the hub.
TO_TRAINERS = "; a trainer that is given the path takes trust_remote_code=True, too (trl: in its config)"


def remedy(entries: Mapping[str, str], name: str) -> str:
    """What the error of a load without our code says: the Auto class that gives the model's class, ``name``.

    A class's own ``from_pretrained`` runs no code of a checkpoint, whatever it is told.
    """
    auto = auto_class_name(entries, name) or "AutoModel*"
    return f"{REMEDY}{auto}.from_pretrained(..., trust_remote_code=True){TO_TRAINERS}"


def auto_class_name(entries: Mapping[str, str], name: str) -> str | None:
    """The best known Auto class that gives the model's class, ``name``; None where none does."""
    found = [auto for auto, remote in entries.items() if remote.rpartition(".")[2] == name]
    found.sort(key=lambda auto: (auto in _LEAST_KNOWN, auto not in _BEST_KNOWN))
    return found[0] if found else None


def auto_classes() -> list[Any]:
    """The Auto classes of models."""
    found = [cls for cls in vars(modeling_auto).values() if isinstance(cls, type) and cls.__name__.startswith("Auto")]
    return [cls for cls in found if getattr(cls, "_model_mapping", None) is not None]


def auto_map(config: PreTrainedConfig, name: str) -> dict[str, str]:
    """``{Auto class: remote class}`` for every Auto class of the config's architecture.

    ``name`` is the model's class, chosen where an Auto class stands for several.
    """
    result = {}
    for auto in auto_classes():
        try:
            mapped = auto._model_mapping.get(type(config), None)
        except ValueError:  # named there, and not exported by its package (the text model of Voxtral's stream)
            continue
        classes = mapped if isinstance(mapped, tuple | list) else [mapped]
        names = [cls.__name__ for cls in classes if cls is not None and cls.__module__.startswith("transformers.")]
        if names:
            chosen = name if name in names else names[0]
            result[auto.__name__] = f"{REMOTE_FILE.removesuffix('.py')}.{chosen}"
    # Transformers' AutoBackbone asks the hub whether a folder exists there, and loads none.
    if auto_class_name(result, name) == "AutoBackbone":
        result["AutoModel"] = result["AutoBackbone"]
    return result


@functools.cache
def known_names() -> frozenset[str]:
    """Every class name in the Auto mappings."""
    values = [value for auto in auto_classes() for value in auto._model_mapping._model_mapping.values()]
    return frozenset(name for value in values for name in ([value] if isinstance(value, str) else value))
