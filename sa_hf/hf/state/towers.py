"""Which parts of a multimodal model are towers: a vision or audio encoder beside the language model.

A model inside says by itself what it takes (``input_modalities``); of what says nothing the name does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel

from sa_hf.errors import UnsupportedModelError

TOWERS = ("vision", "audio")
_TEXT = "text"
_KINDS = {"image": "vision", "video": "vision", "audio": "audio"}
# What a tower may ask for: one image of one size, or patches with the grid of each image.
_TAKEN = {"pixel_values", "hidden_states", "grid_thw"}
_NAMES = {"vision": re.compile(r"vision|visual|image|video|pixel"), "audio": re.compile(r"audio|speech|acoustic|codec")}


def tower_of(root: nn.Module, name: str) -> str | None:
    """The kind of tower, "vision" or "audio", that a part of a model belongs to; None where it is language.

    A model that takes no text at all (ViT) has no towers: its one stack is what there is.
    """
    if _TEXT not in _modalities(root):
        return None
    module, path = root, ""
    for part in name.split(".") if name else ():
        module, path = module.get_submodule(part), f"{path}.{part}".removeprefix(".")
        if _is_body(root, module, path):
            continue
        taken = _modalities(module) if isinstance(module, PreTrainedModel) else {_TEXT}
        if _TEXT not in taken:
            return only_kind(module)
        named = next((kind for kind, words in _NAMES.items() if words.search(part)), None)
        if named is not None:
            return named
    return None


def language_modules(root: nn.Module, taking: Iterable[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model without those of its towers (but the kinds ``taking``), by name."""
    tower = None
    for name, module in root.named_modules():
        if tower is not None and name.startswith(tower):
            continue
        kind = tower_of(root, name)
        if kind is None or kind in taking:
            yield name, module
        else:
            tower = f"{name}."


def only_kind(root: nn.Module) -> str | None:
    """The kind of tower that a model is by itself; None where it takes text."""
    taken = _modalities(root)
    return None if _TEXT in taken else next((_KINDS[kind] for kind in sorted(taken) if kind in _KINDS), None)


def tower_model(root: nn.Module, name: str, kind: str) -> PreTrainedModel:
    """The model inside ``root`` that a part of a tower belongs to, which takes images (or sound) and nothing else.

    Raises:
        UnsupportedModelError: there is none, or it takes more, so that it cannot be run by itself.
    """
    parts = name.split(".")
    inside = [root.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    tower = next((part for part in inside if isinstance(part, PreTrainedModel) and only_kind(part) == kind), None)
    if tower is None:
        raise UnsupportedModelError(f"its {kind} tower is no model by itself, which could be tried; leave it as it is")
    parameters = inspect.signature(tower.forward).parameters.values()
    asked = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not set(asked) <= _TAKEN:
        raise UnsupportedModelError(
            f"its {kind} tower asks for {asked}, and only towers that take pixel_values, or patches with their "
            "grid_thw, get patterns; leave it as it is"
        )
    return tower


def _is_body(root: nn.Module, module: nn.Module, path: str) -> bool:
    """Whether a part is the model itself without its head, or the encoder of one config with its decoder (Whisper)."""
    own = getattr(module, "config", None) is getattr(root, "config", root)
    return path == getattr(root, "base_model_prefix", "") or (own and path.rpartition(".")[2] == "encoder")


def _modalities(module: nn.Module) -> set[str]:
    found = getattr(module, "input_modalities", _TEXT)
    return {found} if isinstance(found, str) else set(found)
