"""Proof, before anything is changed, that every targeted layer is reached: forwards of the model without its weights.

What is run (``skeleton.py``) is built from a copy of the model's config: no cost, no random numbers, and the user's
weights may be sharded or offloaded. It runs the installed transformers: what a release hands to a layer under another
name, or no longer, is refused here and not left out in silence. A decoder runs twice, the second time with the cache
that the first one filled.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.caches.layer import cache_in
from sa_hf.hf.forward.extra_tokens import EmptyTokenHooks
from sa_hf.hf.forward.joined import sparse_mask
from sa_hf.hf.forward.keywords import SINKS, unknown_keywords
from sa_hf.hf.forward.layer_input import Carried
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.forward.position_bias import has_bias_table
from sa_hf.hf.forward.ready_masks import read_mask
from sa_hf.hf.forward.rotary import ROTARY_FUNCTION
from sa_hf.hf.patching.asking import asked
from sa_hf.hf.patching.probe_inputs import (
    STAND_IN,
    ProbeSizes,
    body_of,
    first_inputs,
    inner_model,
    installed_release,
    next_inputs,
    parameters_of,
    takes_keywords,
    takes_positions,
)
from sa_hf.hf.patching.proofs import Replay, changes_its_mask, lacks, rotation_stays, taps_astray
from sa_hf.hf.patching.skeleton import PartlyKnown, failed_line, partly_known, skeleton_of
from sa_hf.hf.state.activity import Activity
from sa_hf.hf.state.sites import Site, Sites
from sa_hf.hf.state.towers import TOWERS, tower_model

PROBE = "sparse_sa_hf_probe"
# The other implementations of a mixture of experts need 16-bit weights, or loop over the experts.
EXPERTS = "batched_mm"
# Transformers' registries are one per process, and so is the probe's entry in them.
_LOCK = threading.Lock()


@dataclass(eq=False)
class _Seen:
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: Any
    keywords: dict[str, Any]
    carried: Carried | None
    ready: bool = False  # the model makes its mask by itself
    unread: str | None = None  # why that is none which a pattern can join


@dataclass(eq=False)
class _Runs:
    """What ran, and what each layer was called with, by its name: without a cache, and on new tokens with one (None:
    the model takes none), and the tokens of these calls; and why what a pattern does inside a layer would not be
    right."""

    body: PreTrainedModel
    sizes: ProbeSizes
    disproved: dict[str, str]
    plain: dict[str, _Seen]
    cached: dict[str, _Seen] | None = None
    stood_in: bool = False  # for an encoder of sound, whose layers were then not called


@dataclass(frozen=True)
class Needs:
    """What a pattern needs of its layer beside queries, keys and values."""

    before_rotary: bool = False
    hidden: bool = False
    taps: bool = False


def probe(
    model: PreTrainedModel, sites: Sites, targets: Mapping[str, Needs], extra: Mapping[str, int] | None = None
) -> None:
    """Run the skeleton and compare what each layer's attention was called with to what its site says.

    Args:
        targets: the names of the attention modules that get a pattern, and what that needs.
        extra: how many tokens join each stack.

    Raises:
        UnsupportedModelError: the skeleton cannot run, or a layer is not reached as described.
    """
    name = type(model).__name__
    for site in sites.all_sites:
        if site.name in targets and changes_its_mask(module := model.get_submodule(site.name)) and not asked(module):
            raise UnsupportedModelError(
                f"{name} cannot be patched: {site.stack} layer {site.spec.layer_idx} ({site.name}) chooses or adds "
                "keys by changing the mask that it is given, which a pattern would drop; keep it dense"
            )
    try:
        with _LOCK:
            runs = _run(model, sites, targets, extra or {})
    except SparseAttentionError as error:
        raise UnsupportedModelError(f"{name} cannot be patched: {error}") from error
    except Exception as error:  # whatever a model's own code raises on shapes alone
        if "MaskRequest" in str(error):
            raise UnsupportedModelError(
                f"{name} cannot be patched: it reads its mask of all pairs, which a pattern never builds, at "
                f"{failed_line(error)}"
            ) from error
        raise UnsupportedModelError(
            f"{name} cannot be patched: a forward of its architecture without its weights failed at "
            f"{failed_line(error)}: {type(error).__name__}: {error}"
        ) from error
    for site in sites.all_sites:
        call, attention = runs.plain.get(site.name), model.get_submodule(site.name)
        if site.stack == "encoder" and runs.stood_in:
            if site.name in targets:
                raise UnsupportedModelError(
                    f"the encoder of {name} takes sound; a pattern can go into its decoder: {{'decoder': ...}}"
                )
            continue
        reason = _wrong(site, attention, call, site.name in targets or bool((extra or {}).get(site.stack)))
        if reason is None and call is not None and site.name in targets:
            reason = _not_served(model, site, call.keywords) or _lost(model, site, call, runs, targets[site.name])
            reason = reason or runs.disproved.get(site.name)
        if reason is not None:
            raise UnsupportedModelError(f"{name} cannot be patched: {site.stack} layer {site.spec.layer_idx} {reason}")


def _run(model: PreTrainedModel, sites: Sites, targets: Mapping[str, Needs], extra: Mapping[str, int]) -> _Runs:
    with partly_known() as mode:
        skeleton = skeleton_of(model, mode, PROBE, EXPERTS, sites.halves)
        sizes, causal = ProbeSizes.of(model), any(site.spec.causal for site in sites.all_sites)
        with _recorder(skeleton, sites) as recorder:
            body, output, given = _started(recorder, skeleton, sites, sizes, {"use_cache": causal})
            caching = causal and "use_cache" in parameters_of(body)
            cache = cache_in((), dict(output)) if caching else None
            if cache is not None and not {"cache", "past_key_values"} & parameters_of(body).keys():
                cache = None  # T5 with a head for questions: it hands one out and takes none
            if cache is not None:
                recorder.run(body, (), next_inputs(body, cache, sizes, given))
            plain, cached = recorder.runs[0], recorder.runs[1] if cache is not None else None
            for kind in [kind for kind in TOWERS if kind in sites.stacks]:
                tower = tower_model(skeleton, sites.stacks[kind][0].name, kind)
                _called_first(recorder, tower, sizes, {})
                plain.update(recorder.runs[-1])
            disproved = {
                site.name: _disproved(site, skeleton.get_submodule(site.name), targets[site.name], recorder, mode)
                for site in sites.all_sites
                if site.name in targets and site.name in plain
            }
            for name in recorder.biased:  # UDOP's, which is of boxes on a page, too
                disproved[name] = f"({name}) is given a position bias of all pairs, which is no table of distances"
            for stack, count in extra.items():
                if count:
                    _join(skeleton, sites.stacks[stack], count, lambda: recorder.run(body, (), given))
    wrong = {name: reason for name, reason in disproved.items() if reason is not None}
    return _Runs(body, sizes, wrong, plain, cached, STAND_IN in given)


@dataclass(eq=False)
class _Recorder:
    """What each layer's attention is called with in the calls of a skeleton, ``runs`` in order; ``given`` is what each
    layer was called with first, ``last`` the latest queries, keys and values, and ``biased`` those that are given the
    bias which they would make."""

    names: dict[nn.Module, str]
    causal: dict[str, bool]
    runs: list[dict[str, _Seen]] = field(default_factory=list)
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    last: tuple[Tensor, Tensor, Tensor] | None = None
    biased: set[str] = field(default_factory=set)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.runs.append({})
        return module(*args, **kwargs)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook of an attention module."""
        self.given.setdefault(self.names[module], (args, kwargs))
        if has_bias_table(module) and kwargs.get("position_bias") is not None:
            self.biased.add(self.names[module])
        if not takes_keywords(module):  # so it hands none on, which the layer is refused for
            return args, kwargs
        return args, {**kwargs, "sparse_call": Carried.by(args, kwargs)}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The attention function."""
        shapes = tuple(query.shape), (*key.shape[:3], getattr(module, "unwidened", key.shape[3])), tuple(value.shape)
        name, carried = self.names[module], kwargs.get("sparse_call")
        if attention_mask is None and isinstance(carried, Carried):
            attention_mask = carried.cut
        ready, unread = isinstance(attention_mask, Tensor), None
        try:
            attention_mask = read_mask(attention_mask, query, key, self.causal.get(name, True))
        except SparseAttentionError as error:  # which a layer left dense may have
            unread = str(error)
        self.runs[-1][name] = _Seen(*shapes, attention_mask, kwargs, carried, ready, unread)
        self.last = query, key, value
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _started(
    recorder: _Recorder, skeleton: PreTrainedModel, sites: Sites, sizes: ProbeSizes, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """What ran, its output and inputs: the model, or, where that asks for more than is known here (an image, and its
    tokens among the others), the language model inside it."""
    try:
        body = body_of(skeleton)
        return body, *_called_first(recorder, body, sizes, options)
    except Exception:
        inner = inner_model(skeleton, [site.name for site in sites.all_sites])
        if inner is None:
            raise
        with contextlib.suppress(Exception):  # the model's own error says more
            return inner, *_called_first(recorder, inner, sizes, options)
        raise


def _called_first(
    recorder: _Recorder, body: PreTrainedModel, sizes: ProbeSizes, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The output of the first call, and the inputs that it took: of sound, the first form that the model takes."""
    options = {name: value for name, value in options.items() if name in parameters_of(body)}
    failures: list[tuple[int, Exception]] = []
    runs, seen = len(recorder.runs), dict(recorder.given)
    for given in first_inputs(body, sizes):
        try:
            return recorder.run(body, (), {**given, **options}), given
        except Exception as error:
            failures.append((len(recorder.runs[runs]), error))
            del recorder.runs[runs:]
            recorder.given = dict(seen)
    unknown = UnsupportedModelError("nothing is known of the inputs that it takes")
    raise max(failures, key=lambda one: one[0], default=(0, unknown))[1]  # of the form that reached most layers


@contextmanager
def _recorder(skeleton: PreTrainedModel, sites: Sites) -> Iterator[_Recorder]:
    """Inside, what a skeleton's layers are called with is recorded."""
    causal = {site.name: site.spec.causal for site in sites.all_sites}
    recorder = _Recorder({module: module_name for module_name, module in skeleton.named_modules()}, causal)
    for site in sites.all_sites:
        skeleton.get_submodule(site.name).register_forward_pre_hook(recorder.before, with_kwargs=True)
    AttentionInterface.register(PROBE, recorder.attend)
    AttentionMaskInterface.register(PROBE, sparse_mask)
    try:
        yield recorder
    finally:
        # The registries are process-wide: leave nothing of the probe in them.
        AttentionInterface._global_mapping.pop(PROBE, None)
        AttentionMaskInterface._global_mapping.pop(PROBE, None)


def _join(skeleton: PreTrainedModel, sites: list[Site], count: int, run: Callable[[], Any]) -> None:
    """Run the skeleton with extra tokens in a stack.

    Raises:
        SparseAttentionError: its layers take more that is of each token than they are given for those.
    """
    blocks = [skeleton.get_submodule(name) for name in dict.fromkeys(site.block for site in sites)]
    handles = EmptyTokenHooks(count, skeleton, blocks[0], Activity()).register(blocks)
    try:
        run()
    except Exception as error:
        raise SparseAttentionError(
            f"its layers do not run with {count} extra token{'s' * (count > 1)} in front of the others "
            f"(num_extra_tokens, relay='virtual'): they fail at {failed_line(error)}: {type(error).__name__}: {error}; "
            "leave them out"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _disproved(site: Site, module: nn.Module, needs: Needs, recorder: _Recorder, mode: PartlyKnown) -> str | None:
    """Why what a pattern does inside a layer would not be what it means, or None."""
    seen = recorder.runs[0][site.name]
    if needs.before_rotary and getattr(module, "widened", False):
        return "has a bias of its keys in channels beside their own, which routing would compare; use another pattern"
    left_to_the_mask = site.spec.causal and seen.keywords.get("is_causal") is False and seen.mask is not None
    if seen.carried is None or not (needs.before_rotary or needs.taps or left_to_the_mask):
        return None
    if (lacking := lacks(module, seen.carried, rotary=needs.before_rotary, taps=needs.taps)) is not None:
        return f"({site.name}) {lacking}"

    def call(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        mode.again()
        recorder.last = None
        recorder.run(*given)
        assert recorder.last is not None  # it has called its attention function before
        return recorder.last

    replay = Replay(module, *recorder.given[site.name], call)
    if left_to_the_mask:  # as it must be said where there is no mask (Moonshine says it then)
        replay.without_mask()
        if recorder.runs[-1][site.name].keywords.get("is_causal") is False:
            return "is causal by its module, but its attention gets is_causal=False, with and without a mask"
    reason = rotation_stays(replay, seen.carried.rotary) if needs.before_rotary else None
    reason = reason or (taps_astray(replay, site.spec) if needs.taps else None)
    return None if reason is None else f"({site.name}) {reason}"


def _wrong(site: Site, attention: nn.Module, seen: _Seen | None, ours: bool) -> str | None:
    """Why the adapter cannot serve a layer, or None; one that is not ``ours`` gets its ready-made mask as it is."""
    spec = site.spec
    if seen is None:
        return f"({site.name}) does not call transformers' AttentionInterface"
    expected = spec.num_heads, spec.num_key_value_heads, spec.num_key_value_heads, spec.head_dim
    found = seen.query[1], seen.key[1], seen.value[1], seen.key[3]
    if found != expected:
        return f"has (heads, key heads, value heads, key dim) = {found}, but its config says {expected}"
    if seen.query[2] != seen.key[2]:
        return f"({site.name}) attends another sequence than its own"
    if seen.carried is None:
        return f"({site.name}) does not hand keywords down to its attention function"
    if seen.mask is not None and not isinstance(seen.mask, MaskRequest):
        why = f"({site.name}) gets a ready-made mask instead of asking transformers' mask functions for it"
        return (why if seen.unread is None else f"{why}: {seen.unread}") if ours else None
    if seen.mask is not None and seen.mask.causal != spec.causal:
        return f"is {'' if spec.causal else 'not '}causal by its module, but its mask says otherwise"
    causal = seen.keywords.get("is_causal")
    if causal is False and seen.mask is not None:  # the mask says it (Moonshine)
        causal = None
    if causal is None and seen.mask is None:
        causal = bool(getattr(attention, "is_causal", False))
    if causal is not None and causal != spec.causal:
        return f"is {'' if spec.causal else 'not '}causal by its module, but its attention gets is_causal={causal}"
    if seen.mask is not None and seen.mask.band.left != spec.band.left:
        return f"has a window of its own, {seen.mask.band}, that its module does not show ({spec.band})"
    if seen.mask is not None and seen.mask.chunk != spec.chunk:
        return f"has chunks of {seen.mask.chunk} tokens, where its config says {spec.chunk}"
    return None


def _not_served(model: PreTrainedModel, site: Site, keywords: dict[str, Any]) -> str | None:
    """Why the adapter cannot give what a targeted layer asks of its attention function, or None."""
    if site.spec.sinks and keywords.get(SINKS) is None:
        return f"has attention sinks, but does not hand them to its attention as {SINKS!r} ({installed_release()})"
    unknown = [name for name in unknown_keywords(keywords) if not (name == SINKS and site.spec.sinks)]
    if unknown:
        return f"hands {unknown[0]!r} to its attention, which sparse attention would have to drop"
    bias = keywords.get("position_bias")
    if bias is not None and bias.shape[-2] != 1:
        # T5's layers share what their first makes, for which a hook gives all of them the table.
        taken = inspect.signature(type(model.get_submodule(site.name)).forward).parameters
        if "position_bias" not in taken or not any(has_bias_table(module) for module in model.modules()):
            return "gets a position bias of all pairs that is no table of distances"
    return None


def _lost(model: PreTrainedModel, site: Site, call: _Seen, runs: _Runs, needs: Needs) -> str | None:
    """What a pattern relies on and does not find in a call of a targeted layer, or None."""
    carried, attention = call.carried, model.get_submodule(site.name)
    if carried is None or not isinstance(carried.hidden, Tensor):
        return f"({site.name}) does not get its input as 'hidden_states' or first ({installed_release()})"
    width = carried.hidden.shape[-1]
    if needs.hidden and width != site.spec.hidden_size:
        return f"({site.name}) reads an input {width} wide, but its config says {site.spec.hidden_size}"
    turns = ROTARY_FUNCTION in inspect.unwrap(type(attention).forward).__code__.co_names
    if turns and needs.before_rotary and carried.rotary is None:
        return f"({site.name}) turns queries and keys, but gets no 'position_embeddings' ({installed_release()})"
    body = parameters_of(runs.body)
    of_tokens = site.stack not in TOWERS and runs.body.main_input_name == "input_ids"
    masked = of_tokens and "attention_mask" in body and not call.ready  # one of its own says what its attention hides
    if masked and call.key[2] == runs.sizes.length and (call.mask is None or call.mask.padding is None):
        return f"({site.name}) does not get the padding mask that the model was given ({installed_release()})"
    if turns and site.spec.causal and not takes_positions(model, runs.body, site.name):
        return f"({site.name}) turns by positions, but its model takes no 'position_ids' ({installed_release()})"
    later = None if runs.cached is None or not site.spec.causal else runs.cached.get(site.name)
    if later is None or later.carried is None or later.key[2] <= later.query[2]:
        return None
    if later.carried.cache is None:
        return (
            f"({site.name}) attends {later.key[2] - later.query[2]} cached keys, but no cache reaches it in a form "
            f"that sa_hf knows, so a pattern could not keep what it needs of them ({installed_release()})"
        )
    if isinstance(later.mask, MaskRequest) and later.mask.query_offset != call.query[2]:
        return (
            f"({site.name}) has {call.query[2]} tokens in its cache, but its mask counts {later.mask.query_offset} "
            f"({installed_release()})"
        )
    return None
