"""Which attention modules of Transformers are given a class that asks the interface, and back."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sa_hf.hf.patching.asking_base import Asking, asking_class
from sa_hf.hf.patching.asking_decoders import DECODERS
from sa_hf.hf.patching.asking_distances import DISTANCES
from sa_hf.hf.patching.asking_encoders import ENCODERS
from sa_hf.hf.patching.asking_indexed import INDEXED
from sa_hf.hf.patching.asking_merged import MERGED
from sa_hf.hf.patching.asking_packed import AskingPacked, cuts_its_row
from sa_hf.hf.patching.asking_relative import RELATIVE
from sa_hf.hf.patching.asking_windows import WINDOWS

CLASSES = {**ENCODERS, **DECODERS, **RELATIVE, **DISTANCES, **WINDOWS, **MERGED, **INDEXED}


def let_ask(model: nn.Module) -> bool:
    """Put the classes that ask on a model's own attention modules; returns whether there are any that did not."""
    changed = False
    config = None
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            config = module.config
        mixin = _mixin(module)
        if mixin is None or isinstance(module, Asking):
            continue
        _switch(module, mixin, config, _around(model, name))
        changed = True
    return changed


def asked(module: nn.Module) -> bool:
    """Whether a module's attention is one that asks the interface while its model is patched."""
    return isinstance(module, Asking) or _mixin(module) is not None


def _mixin(module: nn.Module) -> Any:
    kind, code = type(module).__name__, type(module).__module__
    if not code.startswith("transformers."):
        return None
    named = CLASSES.get(kind) or CLASSES.get(f"{code.rpartition('.')[2]}.{kind}")
    if named is not None and not all(hasattr(module, name) for name in named.needs):
        return None
    return named or (AskingPacked if cuts_its_row(type(module)) else None)


def _around(model: nn.Module, name: str) -> tuple[str, ...]:
    parts = name.split(".")
    return tuple(type(model.get_submodule(".".join(parts[:end]))).__name__ for end in range(len(parts)))


def _switch(module: Any, mixin: Any, config: Any, around: tuple[str, ...]) -> None:
    own = set(vars(module))
    module.sa_hf_around = around
    if "config" not in own:
        module.config = config
    if mixin.causal is not None:
        module.is_causal = mixin.causal
    own_class: Any = type(module)
    module.__class__ = asking_class(mixin, own_class)
    module.prepare()
    module.sa_hf_added = tuple(set(vars(module)) - own)


def let_ask_no_more(model: nn.Module) -> None:
    """Undo :func:`let_ask`."""
    for module in model.modules():
        if isinstance(module, Asking):
            asking: Any = module
            for name in (*asking.sa_hf_added, "sa_hf_added"):
                delattr(asking, name)
            asking.__class__ = asking.own
