"""Outputs and gradients of a patched model against its own eager attention, and what a comparison has found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sa_hf.tools.families.reference import NoReference, own_attention

RIGHT, REFUSED, NOT_BUILT, WRONG, ERROR = "right", "refused", "not built", "wrong", "error"
# Root-mean-square error over the expected tensor's own size, in float32 and through two to four layers.
LIMIT, GRADIENT_LIMIT = 1e-3, 5e-3
Found = tuple[dict[str, Tensor], dict[str, Tensor]]  # outputs and gradients


@dataclass
class Result:
    """What was found: ``status``, its reason, the worst figure of each comparison, and what could not be compared."""

    status: str
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    patched: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value}


def compare(model: Any, inputs: dict[str, Any], name: str, found: Result) -> None:
    """Outputs on real tokens and the gradient of every parameter, ours against the model's own."""
    ours, zeros = outputs_and_gradients(model, inputs), False
    try:
        with own_attention(model):
            own = outputs_and_gradients(model, inputs)
        if not _agree(ours, own) and not bool(inputs.get("attention_mask", torch.ones(1)).all()):
            with own_attention(model, zeros=True):
                zeroed = outputs_and_gradients(model, inputs)
            if _agree(ours, zeroed) or _agree_in_outputs(ours, zeroed) > _agree_in_outputs(ours, own):
                found.notes.append(f"{name}: a head reads a row of padding, which is 0 here")
                own, zeros = zeroed, True
    except NoReference as none:
        found.notes.append(f"{name}: not compared, {none}")
        return
    figure = max((relative_error(ours[0][key], value) for key, value in own[0].items()), default=0.0)
    found.figures[name] = figure
    if not figure <= LIMIT:
        found.status, found.reason = WRONG, f"{name}: {figure:.2g} off in {_worst(ours[0], own[0])}"
        return
    if ours[1]:
        figure, where = gradient_error(ours[1], own[1])
        if not figure <= GRADIENT_LIMIT:
            figure, where = _in_double(model, inputs, zeros=zeros)
            found.notes.append(f"{name}: gradients compared in float64, as float32 rounds more than they are")
        found.figures[f"{name} gradients"] = figure
        if not figure <= GRADIENT_LIMIT:
            found.status, found.reason = WRONG, f"{name}: gradient of {where} {figure:.2g} off"


def _in_double(model: Any, inputs: dict[str, Any], *, zeros: bool) -> tuple[float, str]:
    """:func:`gradient_error` in float64: a saturated layer's gradient may be less than float32's rounding."""
    doubled = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    model.double()
    try:
        ours = outputs_and_gradients(model, doubled)
        with own_attention(model, zeros=zeros):
            own = outputs_and_gradients(model, doubled)
    finally:
        model.float()
    return gradient_error(ours[1], own[1])


def _agree_in_outputs(ours: Found, own: Found) -> bool:
    return all(relative_error(ours[0][key], value) <= LIMIT for key, value in own[0].items())


def _agree(ours: Found, own: Found) -> bool:
    return _agree_in_outputs(ours, own) and gradient_error(ours[1], own[1])[0] <= GRADIENT_LIMIT


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # for models that draw (ViLT its patches' order)
    with torch.no_grad():
        return real_outputs(model(**inputs), inputs)


def outputs_and_gradients(model: Any, inputs: dict[str, Any]) -> Found:
    """Outputs on real tokens, and the gradients of a random weighting of them."""
    torch.manual_seed(0)
    with torch.enable_grad():
        found = real_outputs(model(**inputs), inputs)
        live = [x for x in found.values() if x.requires_grad]
        grads: dict[str, Tensor] = {}
        if live:
            generator = torch.Generator().manual_seed(9)
            loss = torch.stack([(x * torch.randn(x.shape, generator=generator)).sum() for x in live]).sum()
            names, leaves = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
            taken = torch.autograd.grad(loss, leaves, allow_unused=True)
            grads = {n: g for n, g in zip(names, taken, strict=True) if g is not None}
    return {name: value.detach() for name, value in found.items()}, grads


def real_outputs(output: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The floating tensors of an output by their place in it, on real tokens where they have a row for each."""
    mask = inputs.get("attention_mask")
    found = {}
    for name, value in tensors(output):
        if mask is not None and value.shape[: mask.dim()] == mask.shape:
            value = value[mask.bool()]
        if value.numel():
            found[name] = value
    return found


def tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.dtype.is_floating_point:
            yield path or "output", output
    elif isinstance(output, Mapping | tuple | list):
        items = output.items() if isinstance(output, Mapping) else enumerate(output)
        for name, value in items:
            if name not in ("past_key_values", "cache_params", "attentions"):
                yield from tensors(value, f"{path}.{name}".removeprefix("."))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over the expected tensor's root mean square; infinite where the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    size = expected.double().square().mean().sqrt().clamp(min=1e-6)
    figure = float((got - expected).double().square().mean().sqrt() / size)
    return figure if figure == figure else float("inf")


def gradient_error(ours: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[float, str]:
    """The worst error over the parameters; of one whose gradient is all but 0, over a hundredth of the usual size."""
    own = {name: g for name, g in own.items() if g.numel()}  # MobileBERT's head may have a weight without elements
    sizes = {name: float(g.double().square().mean().sqrt()) for name, g in own.items()}
    largest = max(sizes.values(), default=0.0)
    live = sorted(size for size in sizes.values() if size > 1e-9 * largest)  # a saturated tower's are all 0 (ALIGN)
    usual = live[len(live) // 2] if live else 1.0
    worst, where = 0.0, ""
    for name, wanted in own.items():
        got = ours.get(name, torch.zeros_like(wanted))
        figure = float((got - wanted).double().square().mean().sqrt()) / max(sizes[name], 1e-2 * usual, 1e-9)
        if not figure <= worst:
            worst, where = figure, name
    return worst, where


def _worst(ours: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    return max(own, key=lambda name: relative_error(ours[name], own[name]))
