"""One architecture: built tiny, patched, and compared with its own eager attention under the same pairs."""

from __future__ import annotations

import time
import traceback
from typing import Any

import torch

import sa_hf
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.patch import required_patch
from sa_hf.tools.families import generation
from sa_hf.tools.families.compare import (
    ERROR,
    LIMIT,
    NOT_BUILT,
    REFUSED,
    RIGHT,
    WRONG,
    Result,
    compare,
    outputs,
    relative_error,
)
from sa_hf.tools.families.inputs import candidates, padded
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import Entry
from sa_hf.tools.families.shrink import tiny_config

FIRST = sa_hf.SlidingWindowAttentionConfig(window=4, num_sink_tokens=2)
CAUSAL = (sa_hf.LongNetAttentionConfig(segment_length=(4, 32), dilated_ratio=(1, 4)), sa_hf.LogSparseAttentionConfig())
BOTH_WAYS = (
    sa_hf.BigBirdAttentionConfig(block_size=4, num_window_blocks=1, num_random_blocks=1, num_global_blocks=0),
    sa_hf.LongNetAttentionConfig(segment_length=(4, 32), dilated_ratio=(1, 4)),
)


class NotBuilt(Exception):
    """The dense model itself does not run in tiny form; ``model`` is it, where only its inputs are not known."""

    def __init__(self, reason: str, model: Any = None) -> None:
        super().__init__(reason)
        self.model = model


def check(entry: Entry, *, quick: bool = False) -> Result:
    """Everything about one model class; ``quick``: outputs and gradients under one pattern alone.

    Two further patterns are tried in bodies alone: a head's layers are those of its body.
    """
    started = time.perf_counter()
    found = Result(RIGHT)
    try:
        model, inputs = build(entry)
        _check_built(entry, model, inputs, found, quick=quick)
    except NotBuilt as error:
        refusal = _refusal(error.model)
        found.status, found.reason = (NOT_BUILT, str(error)) if refusal is None else (REFUSED, refusal)
    except Exception as error:  # whatever comes is what the table is to say
        known = isinstance(error, SparseAttentionError)
        found.status, found.reason = (REFUSED if known else ERROR), said(error) + ("" if known else _where(error))
    found.seconds = round(time.perf_counter() - started, 2)
    return found


def build(entry: Entry) -> tuple[Any, dict[str, Any]]:
    """A tiny model in evaluation mode, and inputs that it runs on, the same twice.

    Raises: NotBuilt: with the reason.
    """
    torch.manual_seed(0)
    try:
        config = tiny_config(entry.config_class, entry.model_type, entry.name)
        model = entry.cls(config).eval()
    except Exception as error:
        raise NotBuilt(said(error) + _where(error)) from error
    size = sum(p.numel() for p in model.parameters())
    if size > 1e8:
        raise NotBuilt(f"still has {size / 1e6:.0f} M parameters in tiny form")
    scatter(model)
    first = None
    for inputs in candidates(model):
        try:
            once, again = outputs(model, inputs), outputs(model, inputs)
        except Exception as error:
            first = first or error
            continue
        if not once:
            raise NotBuilt("it gives no tensors")
        if any(not torch.equal(once[name], again[name]) for name in once):
            raise NotBuilt("it gives other values each time")
        if not all(x.isfinite().all() for x in once.values()):
            raise NotBuilt("its values are not finite")
        return model, inputs
    raise NotBuilt("it takes no text, pixels or sound" if first is None else said(first) + _where(first), model)


def _refusal(model: Any) -> str | None:
    """Why a model that ran on no inputs known here is refused all the same, if that has nothing to do with inputs."""
    try:
        if model is not None:
            sa_hf.patch_model(model, FIRST)
    except SparseAttentionError as error:
        return None if "failed at" in str(error) else said(error)
    return None


def scatter(model: Any) -> None:
    """Weights large enough that attention matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.dtype.is_floating_point or parameter.numel() == 0:
                continue
            if name.endswith("sinks"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() > 1:
                size = min(0.3, 1.2 / parameter[0].numel() ** 0.5)
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def _check_built(entry: Entry, model: Any, inputs: dict[str, Any], found: Result, *, quick: bool) -> None:
    before = outputs(model, inputs)
    sa_hf.patch_model(model, FIRST)
    sites = required_patch(model, "check").sites.all_sites
    layers = [site for site in sites if getattr(model.get_submodule(site.name), "sparse", None) is not None]
    found.patched = ", ".join(dict.fromkeys(site.stack for site in layers))
    with own_attention(model, patterns=False):
        dense = outputs(model, inputs)
    if any(not relative_error(dense[name], value) < LIMIT for name, value in before.items()):
        raise AssertionError("the model's own attention, called by its name, gives other values")
    compare(model, inputs, FIRST.name, found)
    now = outputs(model, inputs)
    if all(relative_error(now[name], value) < LIMIT for name, value in before.items()) and found.status == RIGHT:
        # So it is with its own attention under the pattern's pairs: nothing is shown.
        found.status, found.reason = NOT_BUILT, "what it returns does not depend on its attention in tiny form"
        if not layers:
            found.status, found.reason = WRONG, "no layer has a pattern"
    if quick or found.status != RIGHT:
        return
    if {"input_ids", "attention_mask"} <= inputs.keys():
        for side in ("right", "left"):
            compare(model, padded(model, inputs, side), f"padded {side}", found)
    others = CAUSAL if all(site.spec.causal for site in layers) else BOTH_WAYS
    for pattern in others if entry.is_base else ():  # a head's layers are its body's
        try:
            sa_hf.patch_model(model, pattern)
        except SparseAttentionError as error:
            found.notes.append(f"{pattern.name}: {said(error)}")
            continue
        compare(model, inputs, pattern.name, found)
    if found.status == RIGHT:
        sa_hf.patch_model(model, FIRST)
        generation.check_generation(model, inputs, found)
        generation.check_reload(entry, model, inputs, found)
    for name, figure in found.figures.items():
        if figure > LIMIT and not name.endswith("gradients"):
            found.status, found.reason = WRONG, f"{name}: {figure:.2g} off"


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SparseAttentionError | NotBuilt) else f"{type(error).__name__}: {text}"[:300]


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return (
        f" ({frames[-1].filename.rpartition('site-packages/')[2].rpartition('/sa_hf/')[2]}:{frames[-1].lineno})"
        if frames
        else ""
    )
