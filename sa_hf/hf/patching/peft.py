"""PEFT for the learned sparse state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.layers import active_child
from sa_hf.hf.state.patch import required_patch
from sa_hf.hf.state.sites import root_model


def _modules_with_state(root: nn.Module, names: Iterable[str]) -> list[str]:
    """The patched modules, of those named, whose pattern has something to save (a parameter or a buffer)."""
    return [name for name in names if active_child(root.get_submodule(name)).state_dict()]


def warn_of_adapter_without_state(model: nn.Module, names: Iterable[str]) -> None:
    """An adapter made before the model was patched saves its own weights only. ``names``: the patched modules."""
    if getattr(model, "peft_config", None) and _modules_with_state(root_model(model), names):
        warnings.warn(
            "this model was wrapped by PEFT before it was patched: saving the adapter leaves out the pattern's learned "
            "state. Patch first, then get_peft_model(model, prepare_peft(config, model))",
            stacklevel=3,
        )


def prepare_peft(peft_config: Any, model: nn.Module) -> Any:
    """A copy of a PEFT config that also trains and saves the learned sparse state of a patched model.

    Call it between ``patch_model`` and ``get_peft_model``: the adapter then carries masks, spans, centroids,
    convolution taps and extra tokens beside its own weights.

    Raises:
        SparseAttentionError: the model is not patched, or the config has no ``modules_to_save``.
    """
    root = root_model(model)
    patch = required_patch(root, "prepare_peft")
    if not hasattr(peft_config, "modules_to_save"):
        raise SparseAttentionError(
            f"{type(peft_config).__name__} has no modules_to_save to carry the sparse state; use LoraConfig"
        )
    names = [site.name for site in patch.sites.all_sites]
    with_state = [f"{name}.sparse" for name in _modules_with_state(root, names)]
    prepared = copy.deepcopy(peft_config)
    prepared.modules_to_save = sorted({*(prepared.modules_to_save or ()), *with_state}) or None
    return prepared
