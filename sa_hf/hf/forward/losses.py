"""Auxiliary losses: joined to the model's own loss in training, kept as figures after every forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.layers import leaves
from sa_hf.hf.state.patch import required_patch
from sa_hf.hf.state.sites import root_model
from sa_hf.hf.state.step import Carrier, Delivery, Joined, share_of_step
from sa_hf.patterns.learned import LearnedAttention
from sa_hf.patterns.mixture import added

# Arguments of a forward that computes a loss.
LABELS = frozenset({"labels", "shift_labels", "start_positions"})


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """The auxiliary losses of the last forward, by name, summed over layers: detached fp32 scalars, unscaled.

    They are there in evaluation too; the live ones join ``loss`` in training, times their coefficients, where labels
    are given. Routing's commitment, off by default (``commitment_coef=0``), is then there in training alone.

    Raises:
        SparseAttentionError: the model is not patched.
    """
    root = root_model(model)
    patch = required_patch(root, "auxiliary_losses")
    return added(child.unscaled_losses() for child in patch.children(root))


def total_losses(children: list[SparseAttention]) -> dict[str, Tensor]:
    """The losses of all layers as they join the model's own, summed by name."""
    return added(child.aux_losses() for child in children)


def add_to_loss(
    model: nn.Module, children: list[SparseAttention], given: Mapping[str, Any], output: Any, delivery: Delivery | None
) -> Any:
    """The model's output with the live auxiliary losses added to its loss; unchanged where it has none.

    Args: delivery: learns where ``backward()`` comes by that loss; None under torch.compile.
    """
    loss = loss_of(output, given)
    extra = total_losses(children)
    if loss is None or not extra:
        return output
    check_live(children)
    step = None if delivery is None else delivery.step
    factor = share_of_step(model, given, None if step is None else step.trainer)
    total = _sum(value * factor for value in extra.values()).to(device=loss.device, dtype=loss.dtype)
    joined = loss + total if delivery is None else Joined.apply(loss, total, delivery, factor)
    if isinstance(output, tuple):
        return joined, *output[1:]
    output["loss"] = joined
    return output


def carrying(children: list[SparseAttention], delivery: Delivery, output: Any) -> Any:
    """A model's output whose tensors carry the auxiliary losses of its layers to a loss that the caller makes of them;
    their values stay. ``backward()`` that comes by ``output.loss`` has them from there, and not twice."""
    check_live(children)
    live = {name: loss for name, loss in total_losses(children).items() if loss.requires_grad}
    if not live:
        return output
    delivery.names = tuple(sorted({*delivery.names, *live}))
    kind = next(iter(live.values())).device.type
    delivery.half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return _plus(output, Carrier.apply(_sum(live.values()), delivery), {})


def _plus(output: Any, zero: Tensor, done: dict[int, tuple[Any, Any]]) -> Any:
    """An output with ``zero`` added to its tensors, which stay equal where they were; keys and values of a cache are
    none of them. ``done``: the tensors that were met, by id, beside what stands for them."""
    if isinstance(output, Tensor):
        if not (output.requires_grad and output.is_floating_point()):
            return output
        if id(output) not in done:
            done[id(output)] = output, output + zero.to(device=output.device, dtype=output.dtype)
        return done[id(output)][1]
    if isinstance(output, ModelOutput):
        for key in [key for key in output if key not in ("loss", "past_key_values", "cache")]:
            output[key] = _plus(output[key], zero, done)
        return output
    if type(output) in (tuple, list):
        return type(output)(_plus(item, zero, done) for item in output)
    return output


def _sum(losses: Iterable[Tensor]) -> Tensor:
    first, *others = losses
    for loss in others:
        first = first + loss.to(first.device)
    return first


@contextmanager
def collected_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block the live losses of each training forward gather in the list, times their coefficients, and join
    no output: for a caller that computes the loss itself and adds them.

    Raises:
        SparseAttentionError: the model is not patched.
    """
    activity = required_patch(root_model(model), "collected_losses").activity
    before, activity.collected = activity.collected, []
    try:
        yield activity.collected
    finally:
        activity.collected = before


def loss_of(output: Any, given: Mapping[str, Any]) -> Tensor | None:
    """The loss in a model's output; None where it computed none."""
    if isinstance(output, tuple):
        labelled = any(given.get(name) is not None for name in LABELS)
        first = output[0] if output else None
        return first if labelled and isinstance(first, Tensor) and first.dim() == 0 else None
    loss = output.get("loss") if isinstance(output, Mapping) else None
    return loss if isinstance(loss, Tensor) else None


def check_live(children: list[SparseAttention]) -> None:
    """That no loss was made without a graph inside a forward that has one; also in the parts of a mixture.

    The layer's parameters do not tell: Routing's commitment trains what its queries and keys come from.
    """
    if not torch.is_grad_enabled():
        return
    for child in children:
        for leaf in leaves(child):
            if isinstance(leaf, LearnedAttention) and leaf.lost_graph:
                raise SparseAttentionError(
                    f"the auxiliary loss of {leaf.config.name!r} has no gradient: reentrant gradient checkpointing "
                    "runs layers without a graph; use gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
