"""The class of a patched model: it is saved with its patterns, and built with them when it is loaded.

A patched model's class becomes a subclass of its own class under the same name (:func:`sparse_class`). Here an
assignment is put into a model and taken out together with that class; what lies in a checkpoint is said in
``sa_hf/hf/checkpoints``.
"""

from __future__ import annotations

import copy
import functools
from types import MethodType
from typing import Any, TypeVar, cast

import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.checkpoints.adapter_state import (
    check_mark,
    drop_mark,
    is_mark,
    load_by_peft,
    load_sparse_state,
    read_adapter,
)
from sa_hf.hf.checkpoints.adapters import save_adapter
from sa_hf.hf.checkpoints.auto import CONFIG_FIELDS, CONFIG_KEY, auto_map, known_names, remedy
from sa_hf.hf.checkpoints.base import remember_base
from sa_hf.hf.checkpoints.loaded import check_sparse_state, saved_assignment, sorted_names
from sa_hf.hf.checkpoints.peft_guard import guard_adapters
from sa_hf.hf.checkpoints.publish import code_files, save_whole
from sa_hf.hf.checkpoints.whole import guard_saving
from sa_hf.hf.forward.adapter import register
from sa_hf.hf.forward.outer import counted_forward
from sa_hf.hf.patching.attach import attach, remove, restore_configs
from sa_hf.hf.patching.families import find_sites, switch_back
from sa_hf.hf.state.activity import IMPLEMENTATION, PLACE
from sa_hf.hf.state.assignment import Assignment
from sa_hf.hf.state.classes import DENSE, dense_class
from sa_hf.hf.state.patch import Patch, patch_of, required_patch
from sa_hf.hf.state.sites import root_model
from sa_hf.hf.state.towers import only_kind
from sa_hf.hf.state.versions import is_untested

Model = TypeVar("Model", bound=nn.Module)
_CHECKED = "sa_hf_state_checked"


# -- a model in memory ---------------------------------------------------------------------------------------------


def apply_assignment(
    model: nn.Module, assignment: Assignment, *, engine: str = "auto", probe: bool = True, max_length: int | None = None
) -> None:
    """Put an assignment (in normal form) into a model, replacing the one that it has, so that it is saved with it.

    Args: as of :func:`~sa_hf.hf.patching.attach.attach`.
    """
    patch = attach(model, assignment, engine=engine, probe=probe, max_length=max_length)
    root = root_model(model)
    _guard()
    patch.handles.append(root.register_load_state_dict_pre_hook(drop_mark))
    enable_saving(root)


def unpatch_model(model: Model) -> Model:
    """Give a model its original attention back, bit for bit; ``sparse.*`` goes, trained weights of the model stay.

    Undoes the ``max_length`` of a ``patch_model`` in this process. A model that was loaded keeps the positions it was
    saved with: the checkpoint holds the lengthened table, and not where it ended before.

    Raises:
        SparseAttentionError: the model is not patched.
    """
    root = root_model(model)
    patch = required_patch(root, "unpatch_model")
    remove(root, patch)
    disable_saving(root)
    restore_configs(root, patch)
    if patch.extension is not None:
        patch.extension.undo(root)
    switch_back(root)
    return model


def _guard() -> None:
    guard_saving()
    guard_adapters()


def _resume(patch: Patch) -> None:
    """Go on in a copy, perhaps in another process: with sparse attention, as a copy is in no ``dense`` block."""
    register()
    _guard()
    if patch.activity.on:
        for config, _ in patch.configs:
            config._attn_implementation_internal = IMPLEMENTATION


def enable_saving(model: PreTrainedModel) -> None:
    """Make a patched model, and the models inside it, save what a load needs; ``config.sa_hf`` must be there."""
    saved = getattr(model.config, CONFIG_KEY)
    models = _models(model)
    holders = [one for one in models if any(PLACE in vars(part) for part in one.modules())]
    for module in models:
        if module not in holders:  # a tower left as it is
            module.__class__ = dense_class(module.__class__)
            _clear(module.config)
    # The outer model last: where models share a config, it says what loads the whole.
    for module in reversed(holders):
        vars(module).pop("save_pretrained", None)
        module.__class__ = sparse_class(module.__class__)
        module.config.sa_hf = saved
        _say_how_to_load(module)


def _say_how_to_load(model: PreTrainedModel) -> None:
    name = type(model).__name__.removeprefix("FSDP")
    model.config.auto_map = auto_map(model.config, name)
    model.config.attn_implementation = remedy(model.config.auto_map, name)


def disable_saving(model: PreTrainedModel) -> None:
    """Undo :func:`enable_saving`; what the model saves from now on is an ordinary checkpoint."""
    for module in _models(model):
        module.__class__ = dense_class(module.__class__)
        _clear(module.config)
        # The folder it saves to may hold the sparse checkpoint.
        module.save_pretrained = MethodType(save_pretrained, module)


def _clear(config: PreTrainedConfig) -> None:
    for field in CONFIG_FIELDS:
        vars(config).pop(field, None)


def _models(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


@functools.wraps(PreTrainedModel.save_pretrained)
def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    save = functools.partial(type(self).save_pretrained, self)
    save_whole(self, save, dict, save_directory, args, kwargs)


# -- the sparse class of a Transformers class ----------------------------------------------------------------------


class SparseModelMixin:
    """Stands in front of a Transformers class: builds the saved patterns at construction, and saves them."""

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        assignment = saved_assignment(config)
        config = copy.deepcopy(config)
        config._attn_implementation = None
        _clear(config)
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]  # the Transformers class behind
        _apply(self, assignment)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]  # as above
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not getattr(model, _CHECKED, False):
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} did not report which weights it found, so learned sparse "
                "state may be missing; save without distributed_checkpoint=True, or use a tested transformers"
            )
        delattr(model, _CHECKED)
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if name is not None and not kwargs.get("subfolder") and not getattr(model, "_hf_peft_config_loaded", False):
            remember_base(model, name, kwargs.get("revision"))
        return loaded

    def load_adapter(self, peft_model_id: Any = None, adapter_name: Any = None, *args: Any, **kwargs: Any) -> Any:
        model = cast(PreTrainedModel, self)
        tensors = kwargs.get("adapter_state_dict")
        if tensors is None and peft_model_id is not None and len(args) < 2:
            tensors = read_adapter(peft_model_id, kwargs)
        if tensors is not None and len(args) < 2:
            check_mark(model, tensors)
            kwargs["adapter_state_dict"] = {key: tensor for key, tensor in tensors.items() if not is_mark(tensor)}
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]  # as above
        name, tensors = adapter_name or "default", tensors or {}
        if info is None and tensors:
            load_by_peft(model, name, tensors)
        # Of what modules_to_save holds some versions of Transformers find nothing.
        filled = load_sparse_state(model, name, tensors)
        if info is not None:
            report = info.to_dict()
            left = [key for key in sorted_names(report.get("missing_keys", ())) if key not in filled]
            check_sparse_state(model, {**report, "missing_keys": left})
        return info

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # The report of from_pretrained itself will not do: with a PEFT adapter in the folder it is the adapter's.
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]  # as above
        check_sparse_state(cast(PreTrainedModel, self), loading_info.to_dict())
        setattr(self, _CHECKED, True)

    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        save = super().save_pretrained  # type: ignore[misc]  # as above
        model = cast(PreTrainedModel, self)
        _say_how_to_load(model)
        if getattr(self, "_hf_peft_config_loaded", False):
            configs: Any = model.peft_config
            save_adapter(model, configs, "base_model.model.", save, save_directory, args, kwargs)
        elif save_whole(model, save, functools.partial(code_files, __name__, __file__), save_directory, args, kwargs):
            remember_base(model, save_directory)

    def push_to_hub(self, repo_id: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]  # as above
        if not getattr(self, "_hf_peft_config_loaded", False):
            remember_base(cast(PreTrainedModel, self), repo_id)
        return result

    def unpatch_model(self) -> Any:
        """``sa_hf.unpatch_model`` of this model, for where sa_hf is not installed."""
        return unpatch_model(cast(PreTrainedModel, self))

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        raise SparseAttentionError(
            f"attn_implementation={attn_implementation!r} would replace the sparse attention of this model; use "
            "`with sa_hf.dense(model):` for a while, or `sa_hf.unpatch_model(model)` for good"
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: a registered class would have Transformers copy code files of its own choice at each save."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # as above
        patch = patch_of(cast(PreTrainedModel, self))
        if patch is not None:
            _resume(patch)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class goes under the name of the Transformers class, so pickle would find that one instead.
        reduced: Any = super().__reduce_ex__(protocol)
        new, (cls, *inputs), *rest = reduced
        return (_new_sparse, (dense_class(cls), *inputs), *rest) if cls in DENSE else (new, (cls, *inputs), *rest)


@functools.cache
def sparse_class(cls: Any) -> Any:
    """The sparse class of a Transformers class: a subclass under its name, with its ``forward`` and its config class.

    Its ``from_pretrained`` loads a saved sparse model; its constructor takes a config with an ``sa_hf`` key.
    """
    if issubclass(cls, SparseModelMixin):
        return cls
    # Named as a direct base where the class generates: Transformers looks for it there.
    generation = (GenerationMixin,) if issubclass(cls, GenerationMixin) else ()
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body["forward"] = counted_forward(cls)
    made = type(cls.__name__, (SparseModelMixin, cls, *generation), body)
    DENSE[made] = cls
    return made


def _new_sparse(cls: type, *inputs: Any) -> Any:
    made = sparse_class(cls)
    return made.__new__(made, *inputs)


# -- loading -------------------------------------------------------------------------------------------------------


def _apply(model: PreTrainedModel, assignment: Assignment) -> None:
    """Patch a model under construction; of an encoder-decoder's assignment, a class of one half takes its half."""
    stacks = find_sites(model).with_towers.stacks
    kind = only_kind(model)
    if kind in assignment:  # a tower that was saved by itself
        assignment = dict.fromkeys(stacks, assignment[kind])
    if len(assignment) > len(stacks):
        assignment = {stack: entries for stack, entries in assignment.items() if stack in stacks}
    # Saved models were probed when they were patched, with a release that is not this one.
    apply_assignment(model, assignment, probe=is_untested())


def remote_attribute(name: str) -> Any:
    """The sparse class that the remote-code file offers under ``name``, a class name of the Auto mappings.

    Raises:
        AttributeError: any other name.
    """
    cls = getattr(transformers, name, None) if name in known_names() else None
    if cls is None:
        raise AttributeError(f"{name!r} is no model class of the Auto mappings of this Transformers")
    return sparse_class(cls)
