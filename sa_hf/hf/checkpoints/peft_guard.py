"""PEFT's own save and hot swap, taught about patched models."""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sa_hf.hf.checkpoints.adapter_state import check_mark, is_mark, load_sparse_state
from sa_hf.hf.checkpoints.adapters import save_adapter
from sa_hf.hf.state.activity import PATCH

_GUARD = "sa_hf_guard"


def guard_adapters() -> None:
    """Have PEFT's saves and hot swaps know patched models, now or once PEFT is imported."""
    if "peft" in sys.modules:
        _guard(sys.modules["peft"])
    elif not any(getattr(finder, _GUARD, False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Waits for the import of PEFT; finds nothing itself."""

    sa_hf_guard = True

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if not hasattr(finder, _GUARD))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _guard(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one spec's loader
        return spec


def _guard(peft: ModuleType) -> None:
    cls = getattr(peft, "PeftModel", None)
    if cls is None or hasattr(cls.save_pretrained, _GUARD):  # still being imported, or done
        return
    save = cls.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        place = _patched_root(self)
        if place is None:
            return save(self, save_directory, *args, **kwargs)
        name, root = place
        run = functools.partial(save, self)
        return save_adapter(root, self.peft_config, f"{name}.", run, save_directory, args, kwargs)

    setattr(save_pretrained, _GUARD, True)
    cls.save_pretrained = save_pretrained
    _guard_swaps()


def _guard_swaps() -> None:
    """A hot swap copies what has the tuner's prefix, and breaks on all else: the patterns' state goes beside it."""
    from peft.utils import hotswap

    swap = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: dict[str, Any], adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        place = _patched_root(model)
        if place is None:
            return swap(model, state_dict, adapter_name, *args, **kwargs)
        check_mark(place[1], state_dict)
        sparse = {key: tensor for key, tensor in state_dict.items() if ".sparse." in key}
        rest = {key: t for key, t in state_dict.items() if key not in sparse and not is_mark(t)}
        result = swap(model, rest, adapter_name, *args, **kwargs)
        load_sparse_state(place[1], adapter_name, sparse)
        return result

    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict


def _patched_root(model: nn.Module) -> tuple[str, PreTrainedModel] | None:
    """The patched model inside one of PEFT's, and its name there; None where it is not patched."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return (name, module) if PATCH in vars(module) else None
    return None
