"""Checkpoints: a patched model saves and loads as any Transformers model does, and never loads dense in silence.

A patched model's class becomes a subclass of its own class under the same name, whose ``save_pretrained`` writes the
code that a load needs. In ``config.json`` it puts

- ``sa_hf``: the assignment of patterns to layers;
- ``auto_map``: the remote-code class for every Auto class of the architecture;
- ``attn_implementation``: a name that is never registered, so that a load without the code raises, with the remedy.

Loading is ``AutoModelFor....from_pretrained(folder, trust_remote_code=True)``; ``pipeline`` and ``AutoConfig`` work
as well, and so do folders that other processes save again, with sa_hf installed or not.

What remains, beyond our reach:

- A load that overrides the field itself, ``attn_implementation="eager"`` (or "sdpa", ...) without
  ``trust_remote_code=True``, or that passes a fresh ``config=``, is dense. With trust the former raises; but a
  ``pipeline`` that is given it as a model argument then falls back to the plain class, which is dense.
- A class of your own is not in the Auto mappings: load it by ``sparse_class(MyModel).from_pretrained(folder)``.
- ``variant=`` saves leave the files of other variants in the folder; ``distributed_checkpoint=True`` (rank-local
  shards for resuming) is written in place, not all at once.
- An adapter of a patched model (see ``adapters.py``) names the place of its base, an absolute path: where that is
  moved, ``base_model_name_or_path`` in its config says the new one. ``dense_model.load_adapter(folder)`` with the
  oldest versions of Transformers (5.5), which look at no shapes, loads it onto a dense model; all others raise.
- Overwriting a checkpoint needs room for both until the new one is complete.
- From the hub, the first load of a checkpoint fetches dozens of small code files, and Transformers announces them; pin
  a ``revision`` to be sure of what runs.
- What a checkpoint carries loads, runs, trains, saves and unpatches (``model.unpatch_model()``); drawing, the tools and
  the command line need sa_hf itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any, cast

import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.checkpoints.adapters import (
    is_mark,
    load_by_peft,
    load_sparse_state,
    read_adapter,
    remember_base,
    save_adapter,
)
from sa_hf.hf.checkpoints.publish import REMOTE_FILE, code_files, save_whole
from sa_hf.hf.state.assignment import Assignment, assignment_from_dict

CONFIG_KEY = "sa_hf"
# What a patched model's config holds beside its architecture's own fields.
CONFIG_FIELDS = (CONFIG_KEY, "auto_map", "attn_implementation")
# Read by a load without our code, whose error then shows it; nobody registers a function under a name that begins so.
REMEDY = "sa_hf: load with "
# Of several Auto classes that give a class, the ones that its users know first, and those that stand for others last.
_BEST_KNOWN = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_LEAST_KNOWN = ("AutoModelForPreTraining", "AutoModelWithLMHead")
_CHECKED = "sa_hf_state_checked"


# -- a model in memory ---------------------------------------------------------------------------------------------


def enable_saving(model: PreTrainedModel) -> None:
    """Make a patched model, and the models inside it, save what a load needs; ``config.sa_hf`` must be there."""
    saved = getattr(model.config, CONFIG_KEY)
    # The outer model last: where models share a config, it says what loads the whole.
    for module in reversed(_models(model)):
        vars(module).pop("save_pretrained", None)
        module.__class__ = sparse_class(module.__class__)
        module.config.sa_hf = saved
        _say_how_to_load(module)


def _say_how_to_load(model: PreTrainedModel) -> None:
    name = type(model).__name__.removeprefix("FSDP")
    model.config.auto_map = auto_map(model.config, name)
    model.config.attn_implementation = remedy(model.config.auto_map, name)


def remedy(entries: Mapping[str, str], name: str) -> str:
    """What the error of a load without our code says: the Auto class that gives the model's class, ``name``.

    A class's own ``from_pretrained`` runs no code of a checkpoint, whatever it is told.
    """
    return f"{REMEDY}{auto_class_name(entries, name) or 'AutoModel*'}.from_pretrained(..., trust_remote_code=True)"


def auto_class_name(entries: Mapping[str, str], name: str) -> str | None:
    """The best known Auto class that gives the model's class, ``name``; None where none does."""
    found = [auto for auto, remote in entries.items() if remote.rpartition(".")[2] == name]
    found.sort(key=lambda auto: (auto in _LEAST_KNOWN, auto not in _BEST_KNOWN))
    return found[0] if found else None


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
            kwargs["adapter_state_dict"] = {key: tensor for key, tensor in tensors.items() if not is_mark(tensor)}
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]  # as above
        name, tensors = adapter_name or "default", tensors or {}
        if info is None and tensors:
            load_by_peft(model, name, tensors)
        # Of what modules_to_save holds some versions of Transformers find nothing.
        filled = load_sparse_state(model, name, tensors)
        if info is not None:
            report = info.to_dict()
            left = [key for key in _names(report.get("missing_keys", ())) if key not in filled]
            _check_sparse_state(model, {**report, "missing_keys": left})
        return info

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # The report of from_pretrained itself will not do: with a PEFT adapter in the folder it is the adapter's.
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]  # as above
        _check_sparse_state(cast(PreTrainedModel, self), loading_info.to_dict())
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
        from sa_hf.hf.patching.patch import unpatch_model

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
        from sa_hf.hf.patching.patch import patch_of

        patch = patch_of(cast(PreTrainedModel, self))
        if patch is not None:
            patch.resume()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class goes under the name of the Transformers class, so pickle would find that one instead.
        reduced: Any = super().__reduce_ex__(protocol)
        new, (cls, *inputs), *rest = reduced
        return (
            (_new_sparse, (dense_class(cls), *inputs), *rest) if _is_sparse_class(cls) else (new, (cls, *inputs), *rest)
        )


@functools.cache
def sparse_class(cls: Any) -> Any:
    """The sparse class of a Transformers class: a subclass under its name, with its ``forward`` and its config class.

    Its ``from_pretrained`` loads a saved sparse model; its constructor takes a config with an ``sa_hf`` key.
    """
    from sa_hf.hf.forward.outer import counted_forward

    if issubclass(cls, SparseModelMixin):
        return cls
    # Named as a direct base where the class generates: Transformers looks for it there.
    generation = (GenerationMixin,) if issubclass(cls, GenerationMixin) else ()
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body["forward"] = counted_forward(cls)
    return type(cls.__name__, (SparseModelMixin, cls, *generation), body)


def dense_class(cls: Any) -> Any:
    """The Transformers class behind a sparse class; any other class as it is."""
    return cls.__bases__[1] if _is_sparse_class(cls) else cls


def _is_sparse_class(cls: type) -> bool:
    return SparseModelMixin in cls.__bases__


def _new_sparse(cls: type, *inputs: Any) -> Any:
    made = sparse_class(cls)
    return made.__new__(made, *inputs)


# -- loading -------------------------------------------------------------------------------------------------------


def saved_assignment(config: PreTrainedConfig) -> Assignment:
    """The assignment in a loaded config.

    Raises:
        SparseAttentionError: there is none, it is not valid, or an ``attn_implementation`` was asked for.
        ConfigVersionError: a newer sa_hf wrote it.
    """
    from sa_hf.hf.forward.adapter import IMPLEMENTATION

    if getattr(config, CONFIG_KEY, None) is None:
        raise SparseAttentionError(
            f"the {type(config).__name__} has no {CONFIG_KEY!r} key, which says where which pattern runs; load the "
            "folder without `config=`, or start from its own: AutoConfig.from_pretrained(folder)"
        )
    asked = config._attn_implementation
    if asked not in (None, IMPLEMENTATION) and not str(asked).startswith(REMEDY):
        raise SparseAttentionError(
            f"attn_implementation={asked!r} would replace the sparse attention of this checkpoint; leave it out. For "
            "dense attention, load and call `sa_hf.unpatch_model(model)`"
        )
    return assignment_from_dict(config.sa_hf)


def _apply(model: PreTrainedModel, assignment: Assignment) -> None:
    """Patch a model under construction; of an encoder-decoder's assignment, a class of one half takes its half."""
    from sa_hf.hf.patching.families import find_sites
    from sa_hf.hf.patching.patch import apply_assignment
    from sa_hf.hf.state.versions import is_untested

    stacks = find_sites(model).stacks
    if len(assignment) > len(stacks):
        assignment = {stack: entries for stack, entries in assignment.items() if stack in stacks}
    # Saved models were probed when they were patched, with a release that is not this one.
    apply_assignment(model, assignment, probe=is_untested())


def _check_sparse_state(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Learned sparse state that is missing, of another shape, or without a place must not pass in silence."""
    present = {name for name, _ in model.named_modules()}
    missing = [name for name in _names(info.get("missing_keys", ())) if _is_sparse_state(name)]
    shaped = [name for name in _names(info.get("mismatched_keys", ())) if _is_sparse_state(name)]
    extra = [
        name
        for name in _names(info.get("unexpected_keys", ()))
        # The other half of an encoder-decoder, or the layers of another architecture, are reported by Transformers.
        if _is_sparse_state(name) and any(owner in present for owner in _owners(model, name))
    ]
    if missing or shaped or extra:
        raise SparseAttentionError(
            f"the weights do not fit the patterns in config.json: missing {missing}, of another shape {shaped}, "
            f"unexpected {extra}; both must come from one save_pretrained of a patched model"
        )


def _names(keys: Iterable[Any]) -> list[str]:
    return sorted(key if isinstance(key, str) else key[0] for key in keys)


def _is_sparse_state(name: str) -> bool:
    return ".sparse." in f".{name}"


def _owners(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """The attention module that a key belongs to: as named, and with the base model's prefix removed or added."""
    owner = f".{name}".partition(".sparse.")[0].removeprefix(".")
    prefix = f"{model.base_model_prefix}."
    return owner, owner.removeprefix(prefix), prefix + owner


# -- config.json --------------------------------------------------------------------------------


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
        mapped = auto._model_mapping.get(type(config), None)
        classes = mapped if isinstance(mapped, tuple | list) else [mapped]
        names = [cls.__name__ for cls in classes if cls is not None and cls.__module__.startswith("transformers.")]
        if names:
            chosen = name if name in names else names[0]
            result[auto.__name__] = f"{REMOTE_FILE.removesuffix('.py')}.{chosen}"
    return result


@functools.cache
def _known_names() -> frozenset[str]:
    """Every class name in the Auto mappings."""
    values = [value for auto in auto_classes() for value in auto._model_mapping._model_mapping.values()]
    return frozenset(name for value in values for name in ([value] if isinstance(value, str) else value))


def remote_attribute(name: str) -> Any:
    """The sparse class that the remote-code file offers under ``name``, a class name of the Auto mappings.

    Raises:
        AttributeError: any other name.
    """
    cls = getattr(transformers, name, None) if name in _known_names() else None
    if cls is None:
        raise AttributeError(f"{name!r} is no model class of the Auto mappings of this Transformers")
    return sparse_class(cls)
