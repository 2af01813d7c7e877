"""``patch_model``, ``unpatch_model``, ``dense``: putting patterns into a model in place, and taking them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.assignment import (
    HEADS,
    Assignment,
    LayerEntry,
    assignment_to_dict,
    check_assignment,
    parse_assignment,
    parse_indices,
)
from sa_hf.hf.attention import IMPLEMENTATION, Activity, DenseMarker, Place, attention_pre_hook, register
from sa_hf.hf.families import Site, Sites, find_sites, root_model
from sa_hf.hf.forward import OuterForward
from sa_hf.hf.position_bias import has_bias_table
from sa_hf.hf.probe import probe as run_probe
from sa_hf.hf.saving import disable_saving, enable_saving
from sa_hf.hf.versions import check_transformers
from sa_hf.ops.engine import ENGINES
from sa_hf.patterns.base import SparseAttention
from sa_hf.patterns.mixture import MixedSparseAttention, check_parts

Model = TypeVar("Model", bound=nn.Module)
_STATE = "sa_hf_patch"


@dataclass(eq=False)
class Patch:
    """What was done to a model, kept on it (``model.sa_hf_patch``) to be undone."""

    assignment: Assignment
    engine: str
    sites: Sites
    activity: Activity
    # (module name, attribute, the config that stood there)
    originals: list[tuple[str, str, PreTrainedConfig]]
    handles: list[Any] = field(default_factory=list)
    # (patched config, its original implementation)
    configs: list[tuple[PreTrainedConfig, str]] = field(default_factory=list)


def patch_of(model: nn.Module) -> Patch | None:
    """The patch of a model, or None where it has none."""
    patch = getattr(root_model(model), _STATE, None)
    return patch if isinstance(patch, Patch) else None


def patch_model(
    model: Model,
    pattern: Any,
    *,
    layers: str | int | Iterable[int] | None = None,
    max_length: int | None = None,
    tokenizer: Any = None,
    rope_parameters: dict[str, Any] | None = None,
    engine: str = "auto",
    **options: Any,
) -> Model:
    """Replace the attention of a Transformers model by a sparse pattern, in place.

    Args:
        pattern: a name, a config, ``{"0-3": "dense", "4-": config}`` by layers, ``{"heads": {"0-5": config, ...}}`` by
            heads, or ``{"encoder": ..., "decoder": ...}``. Unlisted layers stay dense.
        layers: "0-3,6" or a list of places in the stack; None is all.
        max_length: lengthen the model to this many tokens, as ``extend_positions`` does; ``unpatch_model`` undoes it.
        tokenizer: gets the new limit, too.
        rope_parameters: RoPE scaling of a lengthened model.
        engine: "auto", "triton", "native" or "reference".
        options: fields of the config.

    Returns:
        The model itself.

    Raises:
        UnsupportedModelError: the model's attention cannot be replaced exactly; the model stays as it was.
        SparseAttentionError: a pattern, range or option that is wrong; the model stays as it was.
    """
    check_transformers()
    root = root_model(model)
    sites = find_sites(root)
    assignment = parse_assignment(pattern, sites.num_heads, layers=layers, options=options)
    apply_assignment(root, assignment, engine=engine)
    return model


def apply_assignment(model: nn.Module, assignment: Assignment, *, engine: str = "auto", probe: bool = True) -> None:
    """Put an assignment (in normal form) into a model, replacing the one that it has.

    ``probe=False`` is for a model under construction, whose patched form has been probed before it was saved.
    """
    check_transformers()
    root = root_model(model)
    if engine not in ENGINES:
        raise SparseAttentionError(f"engine={engine!r} must be one of {list(ENGINES)}")
    old = patch_of(root)
    sites = find_sites(root)
    check_assignment(assignment, sites.num_heads)
    assignment = {stack: dict(assignment.get(stack, {})) for stack in sites.stacks}
    for site, entry in _targets(sites, assignment):
        _check_entry(entry, site)
    if probe:
        run_probe(root, sites)
    children = {site.name: _build(entry, site, root) for site, entry in _targets(sites, assignment)}
    if old is not None:
        _keep_state(root, old, assignment, children)
        _detach(root, old)
    _attach(root, Patch(assignment, engine, sites, Activity(), []), children)


def unpatch_model(model: Model) -> Model:
    """Give a model its original attention back, bit for bit; ``sparse.*`` goes, trained weights of the model stay.

    Raises:
        SparseAttentionError: the model is not patched.
    """
    root = root_model(model)
    _detach(root, _required(root, "unpatch_model"))
    return model


@contextmanager
def dense(model: Model) -> Iterator[Model]:
    """The model's original attention inside the block."""
    patch = _required(root_model(model), "dense")
    before = [config._attn_implementation for config, _ in patch.configs]
    was_on, patch.activity.on = patch.activity.on, False
    for config, original in patch.configs:
        config._attn_implementation_internal = original
    try:
        yield model
    finally:
        patch.activity.on = was_on
        for (config, _), implementation in zip(patch.configs, before, strict=True):
            config._attn_implementation_internal = implementation


def _required(root: PreTrainedModel, function: str) -> Patch:
    patch = patch_of(root)
    if patch is None:
        raise SparseAttentionError(
            f"{function}: this {type(root).__name__} is not patched; patch_model(model, ...) comes first"
        )
    return patch


# -- building ------------------------------------------------------------------------------------------------------


def _targets(sites: Sites, assignment: Assignment) -> list[tuple[Site, LayerEntry]]:
    return [
        (sites.stacks[stack][layer], entry) for stack, entries in assignment.items() for layer, entry in entries.items()
    ]


def _check_entry(entry: LayerEntry, site: Site) -> None:
    if isinstance(entry, SparseAttentionConfig):
        entry.check_layer(site.spec)
    else:
        check_parts(_parts(entry, site), site.spec)


def _parts(
    entry: dict[str, dict[str, SparseAttentionConfig]], site: Site
) -> list[tuple[tuple[int, ...], SparseAttentionConfig]]:
    return [(parse_indices(key, site.spec.num_heads, "head"), config) for key, config in entry[HEADS].items()]


def _build(entry: LayerEntry, site: Site, root: PreTrainedModel) -> SparseAttention:
    if isinstance(entry, SparseAttentionConfig):
        child = entry.build(site.spec)
    else:
        child = MixedSparseAttention(_parts(entry, site), site.spec)
    return child.train(root.get_submodule(site.name).training)


def _keep_state(
    root: PreTrainedModel, old: Patch, assignment: Assignment, children: dict[str, SparseAttention]
) -> None:
    """A layer whose pattern does not change keeps its learned state: patching is idempotent."""
    for stack, sites in old.sites.stacks.items():
        for layer, site in enumerate(sites):
            before, after = old.assignment[stack].get(layer), assignment[stack].get(layer)
            if before is not None and before == after:
                children[site.name] = cast(SparseAttention, root.get_submodule(site.name).sparse)


# -- attaching and detaching ---------------------------------------------------------------------------------------


def _attach(root: PreTrainedModel, patch: Patch, children: dict[str, SparseAttention]) -> None:
    register()
    _rebind_configs(root, patch)
    original = _original_of(root, patch)
    for site in patch.sites.all_sites:
        module = root.get_submodule(site.name)
        child: nn.Module = children.get(site.name) or DenseMarker()
        child.place = Place(site.spec, patch.engine, original(module), active=patch.activity)  # type: ignore[assignment]  # plain attribute
        module.add_module("sparse", child)
        if site.name in children or has_bias_table(module):
            patch.handles.append(module.register_forward_pre_hook(attention_pre_hook, with_kwargs=True))
    for name in patch.sites.cross:
        module = root.get_submodule(name)
        marker = DenseMarker()
        marker.place = Place(None, patch.engine, original(module), active=patch.activity)
        module.add_module("sparse", marker)
    outer = OuterForward(root, patch.activity)
    patch.handles += outer.register(root)
    root.config.sa_hf = assignment_to_dict(patch.assignment)
    setattr(root, _STATE, patch)
    enable_saving(root)


def _rebind_configs(root: PreTrainedModel, patch: Patch) -> None:
    """Give the model copies of its configs, shared inside it as the originals are, and switch those over."""
    memo: dict[int, Any] = {}
    copies: dict[int, tuple[PreTrainedConfig, str]] = {}
    for name, module in root.named_modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                patch.originals.append((name, attribute, value))
                own = copy.deepcopy(value, memo)
                copies[id(own)] = own, value._attn_implementation or "eager"
                setattr(module, attribute, own)
    patch.configs = list(copies.values())
    for config, _ in patch.configs:
        config._attn_implementation_internal = IMPLEMENTATION


def _original_of(root: PreTrainedModel, patch: Patch) -> Any:
    by_config = {id(config): original for config, original in patch.configs}

    def original(module: nn.Module) -> str:
        return by_config.get(id(getattr(module, "config", None)), by_config[id(root.config)])

    return original


def _detach(root: PreTrainedModel, patch: Patch) -> None:
    for handle in patch.handles:
        handle.remove()
    for name in [*(site.name for site in patch.sites.all_sites), *patch.sites.cross]:
        del root.get_submodule(name).sparse
    for name, attribute, config in patch.originals:
        setattr(root.get_submodule(name), attribute, config)
    delattr(root, _STATE)
    disable_saving(root)
