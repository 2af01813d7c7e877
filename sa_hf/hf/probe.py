"""Proof, before anything is changed, that every targeted layer is reached: a forward on a meta-device skeleton.

The skeleton is built from a copy of the model's config and holds no data: no cost, no random numbers, and the user's
weights may be sharded or offloaded.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.attention import unknown_keywords
from sa_hf.hf.families import Site, Sites, switch_over
from sa_hf.hf.masks import MaskRequest, sparse_mask
from sa_hf.hf.saving import dense_class

PROBE = "sparse_sa_hf_probe"
# The other implementations of a mixture of experts need 16-bit weights, or values, which "meta" has not.
EXPERTS = "batched_mm"
# Different lengths tell self-attention from attention to the encoder.
LENGTH, DECODER_LENGTH = 24, 17
# Transformers' registries are one per process, and so is the probe's entry in them.
_LOCK = threading.Lock()


@dataclass(eq=False)
class _Seen:
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: Any
    keywords: dict[str, Any]


def probe(model: PreTrainedModel, sites: Sites, targets: Container[str]) -> None:
    """Run the skeleton and compare what each layer's attention was called with to what its site says.

    Args: targets: the names of the attention modules that get a pattern.

    Raises:
        UnsupportedModelError: the skeleton cannot run, or a layer is not reached as described.
    """
    name = type(model).__name__
    try:
        with _LOCK:
            seen = _run(model, sites)
    except SparseAttentionError as error:
        raise UnsupportedModelError(f"{name} cannot be patched: {error}") from error
    except Exception as error:  # whatever a model's own code raises on shapes alone
        raise UnsupportedModelError(
            f"{name} cannot be patched: a forward on its meta-device skeleton failed: {type(error).__name__}: {error}"
        ) from error
    for site in sites.all_sites:
        call = seen.get(site.name)
        reason = _wrong(site, call)
        if reason is None and call is not None and site.name in targets:
            reason = _not_served(model.get_submodule(site.name), call.keywords)
        if reason is not None:
            raise UnsupportedModelError(f"{name} cannot be patched: {site.stack} layer {site.spec.layer_idx} {reason}")


def _run(model: PreTrainedModel, sites: Sites) -> dict[str, _Seen]:
    config = copy.deepcopy(model.config)
    config.__dict__.pop("sa_hf", None)
    with torch.device("meta"):
        skeleton = dense_class(type(model))(config)
    skeleton.eval()
    switch_over(skeleton)
    for module in skeleton.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = PROBE
            module.config._experts_implementation = EXPERTS
    names = {module: module_name for module_name, module in skeleton.named_modules()}
    seen: dict[str, _Seen] = {}

    def stub(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        seen[names[module]] = _Seen(*shapes, attention_mask, kwargs)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    for site in sites.all_sites:
        skeleton.get_submodule(site.name).register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "sparse_call": True}), with_kwargs=True
        )
    AttentionInterface.register(PROBE, stub)
    AttentionMaskInterface.register(PROBE, sparse_mask)
    try:
        body = skeleton.base_model
        with torch.no_grad():
            body(**_inputs(body))
    finally:
        # The registries are process-wide: leave nothing of the probe in them.
        AttentionInterface._global_mapping.pop(PROBE, None)
        AttentionMaskInterface._global_mapping.pop(PROBE, None)
    return seen


def _inputs(body: PreTrainedModel) -> dict[str, Any]:
    """Meta inputs of the kind that the model takes."""
    main, config = body.main_input_name, body.config
    parameters = inspect.signature(body.forward).parameters
    given: dict[str, Any] = {}
    if main == "input_ids":
        given["input_ids"] = torch.zeros(1, LENGTH, dtype=torch.long, device="meta")
        if "attention_mask" in parameters:
            given["attention_mask"] = torch.ones(1, LENGTH, dtype=torch.long, device="meta")
        if "decoder_input_ids" in parameters:
            given["decoder_input_ids"] = torch.zeros(1, DECODER_LENGTH, dtype=torch.long, device="meta")
    elif main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        given["pixel_values"] = torch.zeros(1, config.num_channels, height, width, device="meta")
    else:
        raise UnsupportedModelError(f"its input is {main!r}; sparse attention serves models of tokens and of images")
    if "use_cache" in parameters:
        given["use_cache"] = False
    return given


def _wrong(site: Site, seen: _Seen | None) -> str | None:
    """Why the adapter cannot serve a layer, or None."""
    spec = site.spec
    if seen is None:
        return f"({site.name}) does not call transformers' AttentionInterface"
    expected = spec.num_heads, spec.num_key_value_heads, spec.head_dim, spec.head_dim
    found = seen.query[1], seen.key[1], seen.key[3], seen.value[3]
    if found != expected:
        return f"has (heads, key heads, key dim, value dim) = {found}, but its config says {expected}"
    if seen.query[2] != seen.key[2]:
        return f"({site.name}) attends another sequence than its own"
    if "sparse_call" not in seen.keywords:
        return f"({site.name}) does not hand keywords down to its attention function"
    if seen.mask is not None and not isinstance(seen.mask, MaskRequest):
        return f"({site.name}) gets a ready-made mask instead of asking transformers' mask functions for it"
    if seen.mask is not None and seen.mask.causal != spec.causal:
        return f"is {'' if spec.causal else 'not '}causal by its module, but its mask says otherwise"
    if seen.mask is not None and seen.mask.band.left != spec.band.left:
        return f"has a window of its own, {seen.mask.band}, that its module does not show ({spec.band})"
    return None


def _not_served(attention: nn.Module, keywords: dict[str, Any]) -> str | None:
    """Why the adapter cannot give what a targeted layer asks of its attention function, or None."""
    unknown = unknown_keywords(keywords)
    if unknown:
        return f"hands {unknown[0]!r} to its attention, which sparse attention would have to drop"
    taken = inspect.signature(type(attention).forward).parameters
    if keywords.get("position_bias") is not None and "position_bias" not in taken:
        return "builds a position bias of all pairs inside the layer"
    return None
