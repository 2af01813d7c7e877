"""PEFT adapters of patched models: what is saved brings the pattern back, whichever loader of PEFT's reads it.

An adapter's folder holds no base, only its name; PEFT names the model that was patched, which is dense. So a save of
an adapter of a patched model

- names a checkpoint of the *patched* base in ``base_model_name_or_path``, by an absolute path or its hub name: the one
  that ``save_pretrained`` wrote or ``from_pretrained`` read, where the base is as it was then; else the base is saved
  beside the adapter, in ``base/``;
- names the Auto class in ``auto_mapping`` where there is no ``task_type``, so that ``AutoPeftModel`` loads it;
- adds one empty tensor under the name of a weight of the base. Loading the adapter onto a dense base fails on its size,
  in any loader and without our code in the process; a patched base drops it.

PEFT is not imported here. Its save is wrapped when both PEFT is imported and a model has been patched.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.publish import CONFIG_FILE, STAGE
from sa_hf.hf.state.nested import STATE

BASE_FOLDER = "base"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SAVED = "sa_hf_saved"
_GUARD = "sa_hf_guard"


# -- where the patched base is ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedBase:
    """A checkpoint of a patched model: its absolute path or hub name, and what the weights were when it was written."""

    name: str
    revision: str | None
    print: str


def remember_base(root: PreTrainedModel, name: Any, revision: str | None = None) -> None:
    """Note that ``name`` (a folder or a hub name) holds the patched model as it is now."""
    path = os.path.abspath(name) if os.path.isdir(name) else str(name)
    setattr(root, _SAVED, SavedBase(path, revision, _fingerprint(root)))


def saved_base(root: PreTrainedModel) -> SavedBase | None:
    """The checkpoint of a patched model, where there is one that holds it as it is now."""
    saved = getattr(root, _SAVED, None)
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
    inner = _inner(module)
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
        inner = _inner(module)
        if inner is None:
            continue
        inside, kept = f"{name}.", f"{name}.{inner}."
        state = {
            key.replace(kept, inside, 1) if key.startswith(kept) else key: value
            for key, value in state.items()
            if key.startswith(kept) or not key.startswith(inside)
        }
    return state


def _inner(module: nn.Module) -> str | None:
    """Under which name one of PEFT's wrappers holds the module that stood in its place."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return "original_module"
    held = isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), nn.Module)
    return "base_layer" if held else None


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
    base: SavedBase = getattr(root, _SAVED)
    delattr(root, _SAVED)  # it goes with this adapter's folder: the next one gets its own
    return base


# -- saving an adapter -----------------------------------------------------------------------------------------------


def save_adapter(
    root: PreTrainedModel,
    configs: Mapping[str, Any],
    prefix: str,
    save: Callable[..., Any],
    directory: Any,
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> Any:
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
    target.mkdir(parents=True, exist_ok=True)
    base = _base_for(root, target)
    for config in configs.values():
        config.base_model_name_or_path, config.revision = base.name, base.revision
    if options.get("push_to_hub") or keywords.get("push_to_hub"):
        keywords = {"repo_id": target.name, **keywords}
    stage = target / f"{STAGE}{socket.gethostname()}-{os.getpid()}"
    try:
        stage.mkdir()
        if (target / "README.md").is_file():
            shutil.copy(target / "README.md", stage)  # PEFT completes the one that it finds
        result = save(stage, *arguments, **keywords)
        for path in stage.rglob(ADAPTER_CONFIG):
            _mark(path.parent, root, prefix)
        _move(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return result


def _mark(folder: Path, root: PreTrainedModel, prefix: str) -> None:
    """Name the Auto class in the config of an adapter, and put the empty tensor beside its weights."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from sa_hf.hf.patching.sparse_model import auto_class_name

    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    auto = auto_class_name(root.config.auto_map, type(root).__name__)
    if config.get("task_type") is None and auto is not None:
        config["auto_mapping"] = {"base_model_class": auto, "parent_library": "transformers"}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    weights = folder / ADAPTER_WEIGHTS
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    save_file({**tensors, f"{prefix}{_plain_weight(root)}": torch.zeros(0)}, weights, metadata)


def _plain_weight(root: PreTrainedModel) -> str:
    """A weight that any adapter leaves where it is in a dense model: one of a module that PEFT wraps nothing around."""
    wrapped = tuple(f"{name}." for name, module in root.named_modules() if _inner(module) is not None)
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


def is_mark(tensor: Any) -> bool:
    """Whether an entry of an adapter's file is the empty tensor that keeps it from dense bases."""
    return isinstance(tensor, Tensor) and tuple(tensor.shape) == (0,)


def drop_mark(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before ``load_state_dict`` of a patched model: its adapters are at home here."""
    for key in [key for key, tensor in state_dict.items() if key.startswith(prefix) and is_mark(tensor)]:
        del state_dict[key]


# -- loading through Transformers ------------------------------------------------------------------------------------


def read_adapter(name: Any, options: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What the file of an adapter holds but for the empty tensor; None where it is not found or is no safetensors.

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
    return {key: tensor for key, tensor in tensors.items() if not is_mark(tensor)}


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


# -- PEFT's own functions --------------------------------------------------------------------------------------------


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
            return (name, module) if STATE in vars(module) else None
    return None
