"""Loading an adapter of a patched model: the mark that keeps it from dense bases, and the patterns' learned state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.adapters import ADAPTER_WEIGHTS, mark_of


def is_mark(tensor: Any) -> bool:
    """Whether an entry of an adapter's file is the empty tensor that keeps it from dense bases."""
    return isinstance(tensor, Tensor) and tensor.shape[:1] == (0,)


def check_mark(root: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
    """Warn where an adapter was trained under other patterns than those of the model that it is loaded onto."""
    marks = [tensor for tensor in tensors.values() if is_mark(tensor)]
    if any(tensor.dim() > 1 and tensor.shape != mark_of(root).shape for tensor in marks):
        warnings.warn(
            f"this adapter was saved on a {type(root).__name__} with other patterns than those of this one, and is "
            "used under these; for its own, load it onto the base that its adapter_config.json names "
            "(AutoPeftModelFor...from_pretrained(folder, trust_remote_code=True) does)",
            stacklevel=3,
        )


def drop_mark(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before ``load_state_dict`` of a patched model: its adapters are at home here."""
    root = cast(PreTrainedModel, module)
    check_mark(root, {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)})
    for key in [key for key, tensor in state_dict.items() if key.startswith(prefix) and is_mark(tensor)]:
        del state_dict[key]


def read_adapter(name: Any, options: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What the file of an adapter holds; None where it is not found or is no safetensors.

    Args: name: a folder or a hub name; options: what ``load_adapter`` was given.
    """
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    download = dict(getattr(options.get("load_config"), "download_kwargs", None) or {})
    download |= dict(options.get("adapter_kwargs") or {})
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    download |= {key: options[key] for key in names if key in options}
    download = {key: value for key, value in download.items() if key in names and value is not None}
    try:
        path = cached_file(name, ADAPTER_WEIGHTS, **download)
    except OSError:
        return None
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def load_by_peft(root: PreTrainedModel, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Load an adapter that was put in place already: the oldest versions of Transformers, which report nothing, find
    none of its weights in models whose base has a name of its own (BERT's).

    Raises:
        SparseAttentionError: the adapter holds weights that the model has no place for.
    """
    from peft import set_peft_model_state_dict

    plain = {key.removeprefix("base_model.model."): t for key, t in tensors.items() if not is_mark(t)}
    unexpected = set_peft_model_state_dict(root, plain, adapter).unexpected_keys
    if unexpected:
        raise SparseAttentionError(
            f"the adapter holds {sorted(unexpected)}, which this {type(root).__name__} has no place for; load it onto "
            "the base that its adapter_config.json names"
        )


def load_sparse_state(root: PreTrainedModel, adapter: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Copy what an adapter's file holds of the patterns into the modules of that adapter; returns the keys it filled.

    Raises:
        SparseAttentionError: it holds state that the model has no place for, or of another shape.
    """
    filled = []
    for key, tensor in tensors.items():
        path, found, rest = key.partition(".sparse.")
        if not found:
            continue
        path = path.removeprefix("base_model.").removeprefix("model.")
        owner = next((name for name in (path, f"model.{path}") if _copies_of(root, name) is not None), None)
        copies = None if owner is None else _copies_of(root, owner)
        state = {} if copies is None or adapter not in copies else copies[adapter].state_dict()
        if rest not in state or state[rest].shape != tensor.shape:
            raise SparseAttentionError(
                f"the adapter carries {key!r} {tuple(tensor.shape)}, which this {type(root).__name__} has no place for "
                f"under the adapter {adapter!r}; load it onto the base that its adapter_config.json names, under a "
                "name whose config carries the sparse state, too (prepare_peft)"
            )
        with torch.no_grad():
            state[rest].copy_(tensor)
        filled.append(f"{owner}.sparse.modules_to_save.{adapter}.{rest}")
    return filled


def _copies_of(root: nn.Module, name: str) -> nn.ModuleDict | None:
    try:
        copies = getattr(root.get_submodule(f"{name}.sparse"), "modules_to_save", None)
    except AttributeError:
        return None
    return copies if isinstance(copies, nn.ModuleDict) else None
