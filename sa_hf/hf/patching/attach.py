"""Putting an assignment into a model, and taking it out again: everything but how the model saves."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.config import SparseAttention, SparseAttentionConfig
from sa_hf.errors import UnsupportedModelError
from sa_hf.hf.checkpoints.auto import CONFIG_FIELDS
from sa_hf.hf.forward.adapter import register
from sa_hf.hf.forward.convolution import ConvHook, ConvTaps, check_projections
from sa_hf.hf.forward.extra_tokens import ExtraTokenHooks, ExtraTokens, extra_tokens_of_stack, starts_as_mean
from sa_hf.hf.forward.layer_input import attention_pre_hook
from sa_hf.hf.forward.outer import register_forwards
from sa_hf.hf.forward.position_bias import has_bias_table
from sa_hf.hf.forward.rotary import rotary_function
from sa_hf.hf.patching.families import find_sites, switch_over
from sa_hf.hf.patching.probe import Needs
from sa_hf.hf.patching.probe import probe as run_probe
from sa_hf.hf.patching.skeleton import configs_apart
from sa_hf.hf.state.activity import IMPLEMENTATION, PATCH, PLACE, Activity, DenseMarker, Place
from sa_hf.hf.state.assignment import HEADS, Assignment, LayerEntry, assignment_to_dict, check_assignment, parse_indices
from sa_hf.hf.state.extension import own_configs
from sa_hf.hf.state.layers import active_child, learned_leaves, tie_layers
from sa_hf.hf.state.nested import check_not_nested
from sa_hf.hf.state.patch import Patch, patch_of
from sa_hf.hf.state.sites import Site, Sites, own_index, root_model
from sa_hf.hf.state.step import follow_trainers
from sa_hf.hf.state.towers import language_modules
from sa_hf.hf.state.versions import check_transformers
from sa_hf.layer import LayerSpec
from sa_hf.ops.choice import check_engine
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.mixture import MixedSparseAttention, part_spec


def attach(
    model: nn.Module, assignment: Assignment, *, engine: str = "auto", probe: bool = True, max_length: int | None = None
) -> Patch:
    """Put an assignment (in normal form) into a model, replacing the one that it has; how it saves is not changed.

    Args:
        probe: off for a model under construction whose patched form was probed before it was saved, where the installed
            transformers is one of those tested.
        max_length: the input length that the patterns are built for; None is the model's limit.
    """
    check_transformers()
    root = root_model(model)
    check_engine(engine)
    old = patch_of(root)
    sites = find_sites(root, max_length)
    attention = [*(site.name for site in sites.with_towers.all_sites), *sites.bystanders]
    check_not_nested(root, attention, None if old is None else old.activity)
    check_assignment(assignment, sites.with_towers.num_heads)
    sites = sites.taking(assignment)
    assignment = {stack: dict(assignment.get(stack, {})) for stack in sites.stacks}
    extra = _check_stacks(root, sites, assignment)
    if probe:
        run_probe(root, sites, {site.name: _needs(site, entry) for site, entry in targets(sites, assignment)}, extra)
    children = {site.name: _build(entry, site, root) for site, entry in targets(sites, assignment)}
    patch = Patch(assignment, engine, sites, Activity(type(root).__name__))
    if old is not None:
        _keep_state(root, old, assignment, children)
    for stack in sites.stacks.values():
        tie_layers([children[site.name] for site in stack if site.name in children])
    if old is not None:
        remove(root, old)
        patch.inherit(old)
    _attach(root, patch, children, extra)
    return patch


def targets(sites: Sites, assignment: Assignment) -> list[tuple[Site, LayerEntry]]:
    return [
        (sites.stacks[stack][layer], entry) for stack, entries in assignment.items() for layer, entry in entries.items()
    ]


def _check_stacks(root: PreTrainedModel, sites: Sites, assignment: Assignment) -> dict[str, int]:
    """Check every entry against its layer; returns the extra tokens of each stack."""
    for stack, layers in sites.stacks.items():
        # By the heads, too: a part of a mixture is checked over the layers that run it on the same ones.
        together: dict[tuple[SparseAttentionConfig, tuple[int, ...] | None], list[LayerSpec]] = {}
        for index, entry in sorted(assignment.get(stack, {}).items()):
            for spec, config in _running(entry, layers[index]):
                _check_chunk(config, spec)
                _check_terms(config, spec)
                together.setdefault((config, spec.heads), []).append(spec)
        for (config, _), specs in together.items():
            config.check_layers(specs)
    for site, entry in targets(sites, assignment):
        attention = root.get_submodule(site.name)
        if getattr(entry, "conv_kernel_size", 1) > 1:
            check_projections(attention)
        if _needs(site, entry).before_rotary:
            rotary_function(attention)  # raises where it cannot be undone
    return {
        stack: extra_tokens_of_stack([e for e in entries.values() if isinstance(e, SparseAttentionConfig)], stack)
        for stack, entries in assignment.items()
    }


def _needs(site: Site, entry: LayerEntry) -> Needs:
    configs = [config for _, config in _running(entry, site)]
    taps = any(getattr(config, "conv_kernel_size", 1) > 1 for config in configs)
    return Needs(
        before_rotary=any(config.reads_before_rotary for config in configs),
        hidden=taps or not all(isinstance(config, StaticPatternConfig) for config in configs),
        taps=taps,
    )


def _check_chunk(config: SparseAttentionConfig, spec: LayerSpec) -> None:
    if spec.chunk is not None and not isinstance(config, StaticPatternConfig):
        raise UnsupportedModelError(
            f"layer {spec.layer_idx} is cut into chunks of {spec.chunk} tokens, in which {config.name!r}, whose pairs "
            "are learned or chosen by the data, does not run; give it a static pattern, or keep it dense"
        )


def _check_terms(config: SparseAttentionConfig, spec: LayerSpec) -> None:
    if spec.terms and not isinstance(config, StaticPatternConfig):
        raise UnsupportedModelError(
            f"layer {spec.layer_idx} adds to its scores what each query or key makes of the distance to the other "
            f"(DeBERTa, relative keys), which {config.name!r}, whose pairs are learned or chosen by the data, does not "
            "know; give it a static pattern, or keep it dense"
        )


def _running(entry: LayerEntry, site: Site) -> list[tuple[LayerSpec, SparseAttentionConfig]]:
    """The configs that a layer runs, and what each sees of it."""
    if isinstance(entry, SparseAttentionConfig):
        return [(site.spec, entry)]
    return [(part_spec(heads, site.spec), config) for heads, config in _parts(entry, site)]


def _parts(
    entry: dict[str, dict[str, SparseAttentionConfig]], site: Site
) -> list[tuple[tuple[int, ...], SparseAttentionConfig]]:
    return [(parse_indices(key, site.spec.num_heads, "head"), config) for key, config in entry[HEADS].items()]


def _build(entry: LayerEntry, site: Site, root: PreTrainedModel) -> SparseAttention:
    child: SparseAttention
    if isinstance(entry, SparseAttentionConfig):
        child = entry.build(site.spec)
        kernel = getattr(entry, "conv_kernel_size", 1)
        if kernel > 1:
            child.add_module("conv", ConvTaps(kernel, site.spec))
    else:
        child = MixedSparseAttention(_parts(entry, site), site.spec)
    return child.train(root.get_submodule(site.name).training)


def _keep_state(
    root: PreTrainedModel, old: Patch, assignment: Assignment, children: dict[str, SparseAttention]
) -> None:
    """A layer whose pattern does not change keeps its learned state: patching is idempotent."""
    for stack, sites in old.sites.stacks.items():
        for layer, site in enumerate(sites):
            before, after = old.assignment[stack].get(layer), assignment.get(stack, {}).get(layer)
            if before is not None and before == after:
                children[site.name] = cast(SparseAttention, root.get_submodule(site.name).sparse)


def _attach(root: PreTrainedModel, patch: Patch, children: dict[str, SparseAttention], extra: dict[str, int]) -> None:
    register()
    switch_over(root)
    if not patch.originals:
        # The originals may belong to other models, too.
        patch.originals = own_configs(root)
    _switch_configs(root, patch)
    original = _original_of(root, patch)
    for site in patch.sites.all_sites:
        module = root.get_submodule(site.name)
        index = own_index(site.name, module)
        place = Place(site.spec, patch.engine, original(module), patch.activity, extra[site.stack], index)
        _put(module, children.get(site.name) or DenseMarker(), place)
        if site.name in children or has_bias_table(module):
            patch.handles.append(module.register_forward_pre_hook(attention_pre_hook, with_kwargs=True))
        if getattr(children.get(site.name), "conv", None) is not None:
            place.conv = ConvHook(module, site.spec)
            patch.handles += place.conv.register()
    for name in _switched_bystanders(root, patch):
        module = root.get_submodule(name)
        _put(module, DenseMarker(), Place(None, patch.engine, original(module), patch.activity))
    for stack, count in extra.items():
        if count:
            _attach_extra_tokens(root, patch, stack, count)
    patch.handles += register_forwards(root, patch.activity, patch.names, patch.configs)
    if learned_leaves(list(children.values())):
        follow_trainers()
    root.config.sa_hf = assignment_to_dict(patch.assignment)
    setattr(root, PATCH, patch)


def _put(module: nn.Module, child: nn.Module, place: Place) -> None:
    module.add_module("sparse", child)
    setattr(module, PLACE, place)


def _attach_extra_tokens(root: PreTrainedModel, patch: Patch, stack: str, count: int) -> None:
    """Give the learned tokens to the first layer that asks for them, and hook every layer of the stack."""
    sites = patch.sites.stacks[stack]
    layer = next(i for i, e in patch.assignment[stack].items() if getattr(e, "extra_tokens", 0))
    config = cast(SparseAttentionConfig, patch.assignment[stack][layer])
    owner = root.get_submodule(sites[layer].name)
    child = active_child(owner)
    if not starts_as_mean(config) and not hasattr(child, "extra"):
        child.add_module("extra", ExtraTokens(config, sites[layer].spec))
    blocks = [root.get_submodule(name) for name in dict.fromkeys(site.block for site in sites)]
    patch.handles += ExtraTokenHooks(count, owner, blocks[0], patch.activity).register(blocks)


def _switch_configs(root: PreTrainedModel, patch: Patch) -> None:
    """Switch over the model's own configs, but those of towers and halves that are left as they are."""
    language = {
        id(value) for _, module in language_modules(root, patch.sites.stacks) for value in vars(module).values()
    }
    language -= {id(config) for config in configs_apart(root, patch.sites.halves)}
    switched: dict[int, tuple[PreTrainedConfig, str]] = {}
    for name, attribute, original in patch.originals:
        own = getattr(root.get_submodule(name), attribute)
        before = original._attn_implementation or "eager"
        if id(own) in language:
            switched[id(own)] = own, before
        elif any(own is config for config, _ in patch.configs):  # of a tower that had a pattern
            own._attn_implementation_internal = original._attn_implementation_internal
    patch.configs = list(switched.values())
    for config, before in patch.configs:
        config._attn_implementation_internal = IMPLEMENTATION if patch.activity.on else before


def _switched_bystanders(root: PreTrainedModel, patch: Patch) -> list[str]:
    """The attention modules that get no pattern, but ask the adapter, as their config is one of those switched over."""
    switched = {id(config) for config, _ in patch.configs}
    return [
        name
        for name in patch.sites.bystanders
        if id(getattr(root.get_submodule(name), "config", root.config)) in switched
    ]


def restore_configs(root: PreTrainedModel, patch: Patch) -> None:
    """Put the original configs back. Where something else than patching has changed the model's own since (a resized
    vocabulary, another head), those stay, without what patching wrote into them."""
    written = [*CONFIG_FIELDS, *(patch.extension.changed if patch.extension is not None else ())]
    places = [(root.get_submodule(name), attribute, original) for name, attribute, original in patch.originals]
    changed = False
    for module, attribute, original in places:
        own = getattr(module, attribute)
        for key in written:
            if hasattr(original, key):
                setattr(own, key, getattr(original, key))
            else:
                vars(own).pop(key, None)
        own._attn_implementation_internal = original._attn_implementation_internal
        changed = changed or own.to_dict() != original.to_dict()
    if not changed:
        for module, attribute, original in places:
            setattr(module, attribute, original)


def _original_of(root: PreTrainedModel, patch: Patch) -> Any:
    by_config = {id(config): original for config, original in patch.configs}

    def original(module: nn.Module) -> str:
        return by_config.get(id(getattr(module, "config", None)), by_config[id(root.config)])

    return original


def remove(root: PreTrainedModel, patch: Patch) -> None:
    """Take children and hooks out; configs and positions stay."""
    for handle in patch.handles:
        handle.remove()
    for name in [*patch.names, *_switched_bystanders(root, patch)]:
        module = root.get_submodule(name)
        del module.sparse
        delattr(module, PLACE)
    delattr(root, PATCH)
