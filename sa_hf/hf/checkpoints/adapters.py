"""PEFT adapters of patched models: what is saved brings the pattern back, whichever loader of PEFT's reads it.

An adapter's folder holds no base, only its name; PEFT names the model that was patched, which is dense. So a save of
an adapter of a patched model

- names a checkpoint of the *patched* base in ``base_model_name_or_path``, by an absolute path or its hub name: the one
  that ``save_pretrained`` wrote or ``from_pretrained`` read, where the base is as it was then; else the base is saved
  beside the adapter, in ``base/``;
- names the Auto class in ``auto_mapping`` where there is no ``task_type``, so that ``AutoPeftModel`` loads it;
- adds one empty tensor under the name of a weight of the base. Loading the adapter onto a dense base fails on its size,
  in any loader and without our code in the process; a patched base drops it. Its width is a number of the patterns, so
  that a base with other ones warns.

PEFT is not imported here. Its save is wrapped when both PEFT is imported and a model has been patched.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.auto import auto_class_name
from sa_hf.hf.checkpoints.base import SAVED, SavedBase, base_state, inner_name, remember_base, saved_base
from sa_hf.hf.checkpoints.files import stage_in

BASE_FOLDER = "base"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def _check_can_be_saved(root: PreTrainedModel) -> None:
    if any(getattr(module, "merged", False) is True for module in root.modules()):
        raise SparseAttentionError(
            "an adapter is merged into the weights of this model, so its base cannot be saved beside it; "
            "model.unmerge_adapter() comes first, or save the whole: model.merge_and_unload().save_pretrained(...)"
        )
    tensors = [*root.parameters(), *root.buffers()]
    if any(t.is_meta or hasattr(t, "ds_id") or hasattr(t, "device_mesh") for t in tensors) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in root.modules()
    ):
        raise SparseAttentionError(
            f"the adapter of this {type(root).__name__} needs its patched base, which is sharded or offloaded and has "
            "not been saved as it is; call model.save_pretrained(folder) after patch_model, before get_peft_model"
        )


def _base_for(root: PreTrainedModel, folder: Path) -> SavedBase:
    """The checkpoint that an adapter saved in ``folder`` names; written there where there is none yet."""
    saved = saved_base(root)
    if saved is not None:
        return saved
    _check_can_be_saved(root)
    state = base_state(root)
    target = folder / BASE_FOLDER
    loaded, root._hf_peft_config_loaded = getattr(root, "_hf_peft_config_loaded", False), False
    try:
        root.save_pretrained(target, state_dict=state)
    finally:
        root._hf_peft_config_loaded = loaded
    megabytes = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    warnings.warn(
        f"the patched base of this adapter was not saved as it is now, so it was saved beside it ({target}, "
        f"{megabytes:,.0f} MB), and so it is at each save; model.save_pretrained(folder) after patch_model, before "
        "get_peft_model(model, prepare_peft(config, model)), saves it once",
        stacklevel=4,
    )
    remember_base(root, target)
    base: SavedBase = getattr(root, SAVED)
    delattr(root, SAVED)  # it goes with this adapter's folder: the next one gets its own
    return base


def save_adapter(
    root: PreTrainedModel, configs: Mapping[str, Any], prefix: str, save: Callable[..., Any], directory: Any,
    arguments: tuple[Any, ...], keywords: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Run ``save``, which writes adapters of the patched model ``root``, so that what it writes needs the patched base.

    Args:
        configs: PEFT's configs, by the adapters' names.
        prefix: what stands before a name of the model's in the adapter's file.
        directory, arguments, keywords: what the caller gave to ``save_pretrained``.

    Raises:
        SparseAttentionError: the base cannot be saved beside it, or the adapter is asked for as a pickle.
    """
    call = inspect.signature(save).bind(directory, *arguments, **keywords)
    call.apply_defaults()
    options = dict(call.arguments)
    if not options.get("is_main_process", True):
        return save(directory, *arguments, **keywords)
    if not options.get("safe_serialization", True):
        raise SparseAttentionError(
            "safe_serialization=False would write an adapter that loads onto a dense base in silence; leave it out"
        )
    target = Path(directory)
    if target.is_file():
        raise SparseAttentionError(f"{str(target)!r} is a file; name a folder")
    base = _base_for(root, target)
    for config in configs.values():
        config.base_model_name_or_path, config.revision = base.name, base.revision
    if options.get("push_to_hub") or keywords.get("push_to_hub"):
        keywords = {"repo_id": target.name, **keywords}
    with stage_in(target) as stage:
        if (target / "README.md").is_file():
            shutil.copy(target / "README.md", stage)  # PEFT completes the one that it finds
        result = save(stage, *arguments, **keywords)
        for path in stage.rglob(ADAPTER_CONFIG):
            _mark(path.parent, root, prefix)
        _move(stage, target)
    return result


def _mark(folder: Path, root: PreTrainedModel, prefix: str) -> None:
    """Name the Auto class in the config of an adapter, and put the empty tensor beside its weights."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    auto = auto_class_name(root.config.auto_map, type(root).__name__)
    if config.get("task_type") is None and auto is not None:
        config["auto_mapping"] = {"base_model_class": auto, "parent_library": "transformers"}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    weights = folder / ADAPTER_WEIGHTS
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    save_file({**tensors, f"{prefix}{_plain_weight(root)}": mark_of(root)}, weights, metadata)


def mark_of(root: PreTrainedModel) -> torch.Tensor:
    """The empty tensor ``[0, number of the patterns]`` of a patched model's adapters."""
    digest = hashlib.sha256(json.dumps(root.config.sa_hf, sort_keys=True).encode()).digest()
    return torch.zeros(0, int.from_bytes(digest[:4]) >> 1)


def _plain_weight(root: PreTrainedModel) -> str:
    """A weight that any adapter leaves where it is in a dense model: one of a module that PEFT wraps nothing around."""
    wrapped = tuple(f"{name}." for name, module in root.named_modules() if inner_name(module) is not None)
    names = [name for name, _ in root.named_parameters() if not name.startswith(wrapped) and ".sparse." not in name]
    if not names:
        raise SparseAttentionError(
            f"an adapter that wraps every weight of a {type(root).__name__} cannot be told from one of a dense model; "
            "leave a module out of target_modules or modules_to_save"
        )
    norms = [name for name in names if "norm" in name.lower()]  # of all, adapted least
    return str((norms or names)[0])


def _move(stage: Path, target: Path) -> None:
    """Move the files of a stage to their places, the adapters' configs last."""
    for path in sorted(stage.rglob("*"), key=lambda path: path.name == ADAPTER_CONFIG):
        place = target / path.relative_to(stage)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)
