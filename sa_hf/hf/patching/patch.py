"""``patch_model``, ``unpatch_model``, ``dense``: putting patterns into a model in place, and taking them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.config import SparseAttention, SparseAttentionConfig
from sa_hf.hf.checkpoints.adapters import drop_mark, guard_adapters
from sa_hf.hf.forward.adapter import IMPLEMENTATION, PLACE, Activity, DenseMarker, Place, attention_pre_hook, register
from sa_hf.hf.forward.convolution import ConvHook, ConvTaps, check_projections
from sa_hf.hf.forward.extra_tokens import ExtraTokenHooks, ExtraTokens, extra_tokens_of_stack, starts_as_mean
from sa_hf.hf.forward.outer import register_forwards
from sa_hf.hf.forward.position_bias import has_bias_table
from sa_hf.hf.forward.rotary import rotary_function
from sa_hf.hf.patching.families import Site, Sites, find_sites, root_model, switch_back, switch_over
from sa_hf.hf.patching.probe import probe as run_probe
from sa_hf.hf.patching.sparse_model import CONFIG_FIELDS, disable_saving, enable_saving
from sa_hf.hf.state.assignment import (
    HEADS,
    Assignment,
    LayerEntry,
    assignment_to_dict,
    check_assignment,
    parse_assignment,
    parse_indices,
)
from sa_hf.hf.state.layers import active_child, learned_leaves, sparse_children, tie_layers
from sa_hf.hf.state.nested import STATE, check_not_nested, guard_saving, not_patched
from sa_hf.hf.state.positions import LIMIT, Extension, check_tokenizer, own_configs, plan_extension
from sa_hf.hf.state.step import follow_trainers
from sa_hf.hf.state.versions import check_transformers
from sa_hf.hf.training.groups import warn_of_adapter_without_state
from sa_hf.layer import LayerSpec
from sa_hf.ops.choice import check_engine
from sa_hf.patterns.mixture import MixedSparseAttention, part_spec

Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class Patch:
    """What was done to a model, kept on it (``model.sa_hf_patch``) to be undone."""

    assignment: Assignment
    engine: str
    sites: Sites
    activity: Activity
    handles: list[Any] = field(default_factory=list)
    # (module name, attribute, the config that stood there)
    originals: list[tuple[str, str, PreTrainedConfig]] = field(default_factory=list)
    # (patched config, its original implementation)
    configs: list[tuple[PreTrainedConfig, str]] = field(default_factory=list)
    extension: Extension | None = None

    @property
    def names(self) -> list[str]:
        """The self-attention modules, in the order of the stacks."""
        return [site.name for site in self.sites.all_sites]

    def children(self, root: nn.Module) -> list[SparseAttention]:
        """The pattern modules of the layers that are not dense."""
        return sparse_children(root, self.names)

    def resume(self) -> None:
        """Go on in a copy, perhaps in another process: with sparse attention, as a copy is in no ``dense`` block."""
        register()
        guard_saving()
        guard_adapters()
        if self.activity.on:
            for config, _ in self.configs:
                config._attn_implementation_internal = IMPLEMENTATION

    def inherit(self, old: Patch) -> None:
        """Take over what patching again leaves as it is: configs already copied, positions already lengthened."""
        self.originals, self.configs, self.extension = old.originals, old.configs, old.extension
        self.activity = old.activity  # inside dense(model), patching again ends no block


def patch_of(model: nn.Module) -> Patch | None:
    """The patch of a model, or None where it has none."""
    patch = getattr(root_model(model), STATE, None)
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

    Sequences: ``attention_mask [batch, length]`` with padding on either side or inside. Packed rows are told apart by
    ``sequence_ids [batch, length]`` given to the model's forward, by ``cu_seq_lens_q``, or, in decoders without an
    attention mask, by ``position_ids`` that restart; layers left dense see the same sequences, also with ``use_cache``
    on (where Transformers' own mask would not). A gap in them cuts as in Transformers: without a cache only. 4-D masks
    are refused.

    Patch the whole model, not a part of it (``model.bert``): of a part that is patched alone the model around it knows
    nothing. Its ``save_pretrained`` raises, auxiliary losses are not in the figure of its ``loss`` (they reach the
    parameters through it, with a warning), ``max_length`` is not in its config, and every function here takes the part.
    A base model that is used by itself is a whole.

    Args:
        pattern: a name, a config, ``{"0-3": "dense", "4-": config}`` by layers, ``{"heads": {"0-5": config, ...}}`` by
            heads, or ``{"encoder": ..., "decoder": ...}``. Unlisted layers stay dense.
        layers: "0-3,6" or a list of places in the stack; None is all.
        max_length: lengthen the model to this many tokens, as ``extend_positions`` does; ``unpatch_model`` undoes it.
        tokenizer: gets the new limit, too; without one a warning says that it still cuts at its own.
        rope_parameters: RoPE scaling of a lengthened model.
        engine: "auto", "triton", "native" or "torch"; what cannot serve a call raises when the model runs.
        options: fields of the config.

    Returns:
        The model itself.

    Raises:
        UnsupportedModelError: the model's attention cannot be replaced exactly; the model stays as it was.
        SparseAttentionError: a wrong pattern, range or option, or a part of the model or the model around it is patched
            already; the model stays as it was.
    """
    check_transformers()
    root = root_model(model)
    check_tokenizer(tokenizer)
    sites = find_sites(root)
    assignment = parse_assignment(pattern, sites.num_heads, layers=layers, options=options)
    lengthening = None
    if max_length is not None or rope_parameters is not None:
        lengthening = plan_extension(root, max_length, tokenizer, rope_parameters)
    apply_assignment(root, assignment, engine=engine, max_length=max_length)
    if lengthening is not None:
        patch = required_patch(root, "patch_model")
        patch.extension = lengthening.apply(root, before=patch.extension)
    warn_of_adapter_without_state(model, (site.name for site, _ in _targets(sites, assignment)))
    return model


def apply_assignment(
    model: nn.Module,
    assignment: Assignment,
    *,
    engine: str = "auto",
    probe: bool = True,
    max_length: int | None = None,
) -> None:
    """Put an assignment (in normal form) into a model, replacing the one that it has.

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
    attention = [*(site.name for site in sites.all_sites), *sites.cross]
    check_not_nested(root, attention, None if old is None else old.activity)
    check_assignment(assignment, sites.num_heads)
    assignment = {stack: dict(assignment.get(stack, {})) for stack in sites.stacks}
    extra = _check_stacks(root, sites, assignment)
    if probe:
        run_probe(root, sites, {site.name for site, _ in _targets(sites, assignment)})
    children = {site.name: _build(entry, site, root) for site, entry in _targets(sites, assignment)}
    patch = Patch(assignment, engine, sites, Activity(type(root).__name__))
    if old is not None:
        _keep_state(root, old, assignment, children)
    for stack in sites.stacks.values():
        tie_layers([children[site.name] for site in stack if site.name in children])
    if old is not None:
        _remove(root, old)
        patch.inherit(old)
    _attach(root, patch, children, extra)


def unpatch_model(model: Model) -> Model:
    """Give a model its original attention back, bit for bit; ``sparse.*`` goes, trained weights of the model stay.

    Undoes the ``max_length`` of a ``patch_model`` in this process. A model that was loaded keeps the positions it was
    saved with: the checkpoint holds the lengthened table, and not where it ended before.

    Raises:
        SparseAttentionError: the model is not patched.
    """
    root = root_model(model)
    patch = required_patch(root, "unpatch_model")
    _remove(root, patch)
    disable_saving(root)
    _restore_configs(root, patch)
    if patch.extension is not None:
        patch.extension.undo(root)
    switch_back(root)
    return model


@contextmanager
def dense(model: Model) -> Iterator[Model]:
    """The model's original attention inside the block.

    With gradient checkpointing the layers run again in ``backward()``, which then belongs inside the block, too: it
    raises outside. (Of a checkpoint of your own around layers nothing is known here.)
    """
    root = root_model(model)
    patch = required_patch(root, "dense")
    before = [config._attn_implementation for config, _ in patch.configs]
    was_on, patch.activity.on = patch.activity.on, False
    for config, original in patch.configs:
        config._attn_implementation_internal = original
    try:
        yield model
    finally:
        patch.activity.on = was_on
        now = patch_of(root)
        if now is not None and now.configs is patch.configs:  # else unpatched meanwhile: its configs are as they were
            for (config, _), implementation in zip(patch.configs, before, strict=True):
                config._attn_implementation_internal = implementation


def required_patch(root: PreTrainedModel, function: str) -> Patch:
    """The patch of a model that ``function`` needs; raises ``SparseAttentionError`` where there is none."""
    patch = patch_of(root)
    if patch is None:
        raise not_patched(root, function)
    return patch


# -- building ------------------------------------------------------------------------------------------------------


def _targets(sites: Sites, assignment: Assignment) -> list[tuple[Site, LayerEntry]]:
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
                together.setdefault((config, spec.heads), []).append(spec)
        for (config, _), specs in together.items():
            config.check_layers(specs)
    for site, entry in _targets(sites, assignment):
        attention = root.get_submodule(site.name)
        if getattr(entry, "conv_kernel_size", 1) > 1:
            check_projections(attention)
        if any(config.reads_before_rotary for _, config in _running(entry, site)):
            rotary_function(attention)  # raises where it cannot be undone
    return {
        stack: extra_tokens_of_stack([e for e in entries.values() if isinstance(e, SparseAttentionConfig)], stack)
        for stack, entries in assignment.items()
    }


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
            before, after = old.assignment[stack].get(layer), assignment[stack].get(layer)
            if before is not None and before == after:
                children[site.name] = cast(SparseAttention, root.get_submodule(site.name).sparse)


# -- attaching and detaching ---------------------------------------------------------------------------------------


def _attach(root: PreTrainedModel, patch: Patch, children: dict[str, SparseAttention], extra: dict[str, int]) -> None:
    register()
    guard_saving()
    guard_adapters()
    switch_over(root)
    if not patch.configs:
        _rebind_configs(root, patch)
    original = _original_of(root, patch)
    for site in patch.sites.all_sites:
        module = root.get_submodule(site.name)
        place = Place(site.spec, patch.engine, original(module), patch.activity, extra[site.stack])
        _put(module, children.get(site.name) or DenseMarker(), place)
        if site.name in children or has_bias_table(module):
            patch.handles.append(module.register_forward_pre_hook(attention_pre_hook, with_kwargs=True))
        if getattr(children.get(site.name), "conv", None) is not None:
            patch.handles += ConvHook(module, site.spec).register()
    for name in patch.sites.cross:
        module = root.get_submodule(name)
        _put(module, DenseMarker(), Place(None, patch.engine, original(module), patch.activity))
    for stack, count in extra.items():
        if count:
            _attach_extra_tokens(root, patch, stack, count)
    patch.handles += register_forwards(root, patch.activity, patch.names, patch.configs)
    if learned_leaves(list(children.values())):
        follow_trainers()
    patch.handles.append(root.register_load_state_dict_pre_hook(drop_mark))
    root.config.sa_hf = assignment_to_dict(patch.assignment)
    setattr(root, STATE, patch)
    enable_saving(root)


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


def _rebind_configs(root: PreTrainedModel, patch: Patch) -> None:
    """Give the model copies of its configs and switch those over; the originals may belong to other models, too."""
    patch.originals = own_configs(root)
    implementations: dict[int, tuple[PreTrainedConfig, str]] = {}
    for name, attribute, original in patch.originals:
        own = getattr(root.get_submodule(name), attribute)
        implementations[id(own)] = own, original._attn_implementation or "eager"
    patch.configs = list(implementations.values())
    for config, _ in patch.configs:
        config._attn_implementation_internal = IMPLEMENTATION


def _restore_configs(root: PreTrainedModel, patch: Patch) -> None:
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


def keep_extension(patch: Patch, extension: Extension) -> None:
    """Make a lengthening outlast the patch: the configs that ``unpatch_model`` puts back get the new limits."""
    memo: dict[int, Any] = {}
    for place, (name, attribute, original) in enumerate(patch.originals):
        kept = copy.deepcopy(original, memo)
        for key, value in extension.changed.items():
            if key != LIMIT and getattr(kept, key, None) is not None:
                setattr(kept, key, value)
        limit = getattr(kept, LIMIT, None)
        before = patch.extension.limits if patch.extension is not None else {}
        if isinstance(limit, int) and before.get(limit, limit) in extension.limits:
            setattr(kept, LIMIT, extension.limits[before.get(limit, limit)])
        patch.originals[place] = name, attribute, kept


def _original_of(root: PreTrainedModel, patch: Patch) -> Any:
    by_config = {id(config): original for config, original in patch.configs}

    def original(module: nn.Module) -> str:
        return by_config.get(id(getattr(module, "config", None)), by_config[id(root.config)])

    return original


def _remove(root: PreTrainedModel, patch: Patch) -> None:
    """Take children and hooks out; configs and positions stay."""
    for handle in patch.handles:
        handle.remove()
    for name in [*patch.names, *patch.sites.cross]:
        module = root.get_submodule(name)
        del module.sparse
        delattr(module, PLACE)
    delattr(root, STATE)
