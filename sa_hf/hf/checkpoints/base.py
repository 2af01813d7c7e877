"""Which checkpoint holds the patched base of an adapter, and the base's own weights where PEFT has wrapped it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sa_hf.hf.checkpoints.files import CONFIG_FILE

SAVED = "sa_hf_saved"


@dataclass(frozen=True)
class SavedBase:
    """A checkpoint of a patched model: its absolute path or hub name, and what the weights were when it was written."""

    name: str
    revision: str | None
    print: str


def remember_base(root: PreTrainedModel, name: Any, revision: str | None = None) -> None:
    """Note that ``name`` (a folder or a hub name) holds the patched model as it is now."""
    path = os.path.abspath(name) if os.path.isdir(name) else str(name)
    setattr(root, SAVED, SavedBase(path, revision, _fingerprint(root)))


def saved_base(root: PreTrainedModel) -> SavedBase | None:
    """The checkpoint of a patched model, where there is one that holds it as it is now."""
    saved = getattr(root, SAVED, None)
    if not isinstance(saved, SavedBase) or saved.print != _fingerprint(root):
        return None
    gone = os.path.isabs(saved.name) and not os.path.isfile(os.path.join(saved.name, CONFIG_FILE))
    return None if gone else saved


def _fingerprint(root: PreTrainedModel) -> str:
    """Changes with any in-place change of the base's weights, with other weights in their place, and with its config.

    Parameters are told by identity and version, which moving a model keeps; buffers, which it replaces, by value. No
    ``state_dict()``: of a sharded model all ranks would have to ask for it.
    """
    digest = hashlib.sha256(json.dumps(root.config.sa_hf, sort_keys=True).encode())
    for name, module in _base_modules(root, ""):
        for key, parameter in module.named_parameters(name, recurse=False):
            at = "offloaded" if parameter.is_meta else id(parameter)
            version = 0 if parameter.is_inference() else parameter._version
            digest.update(f"{key} {tuple(parameter.shape)} {at} {version}".encode())
        for key, buffer in module.named_buffers(name, recurse=False):
            if key.rpartition(".")[2] not in module._non_persistent_buffers_set and not buffer.is_meta:
                value = buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                digest.update(key.encode() + value)
    return digest.hexdigest()


def _base_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model as they were before PEFT put adapters into it."""
    inner = inner_name(module)
    if inner is not None:
        yield from _base_modules(module.get_submodule(inner), name)
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _base_modules(child, f"{name}.{child_name}")


def base_state(root: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of a model as it was before PEFT put adapters into it."""
    state: dict[str, Tensor] = dict(root.state_dict())
    for name, module in root.named_modules():
        inner = inner_name(module)
        if inner is None:
            continue
        inside, kept = f"{name}.", f"{name}.{inner}."
        state = {
            key.replace(kept, inside, 1) if key.startswith(kept) else key: value
            for key, value in state.items()
            if key.startswith(kept) or not key.startswith(inside)
        }
    return state


def inner_name(module: nn.Module) -> str | None:
    """Under which name one of PEFT's wrappers holds the module that stood in its place."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return "original_module"
    held = isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), nn.Module)
    return "base_layer" if held else None
