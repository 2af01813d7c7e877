"""How auxiliary losses reach the parameters where the caller trains on another loss than ``output.loss``.

What a model returns then carries a zero whose backward adds their gradient: log-probabilities, embeddings, logits.
What scales the caller's loss must scale them, too, and is no part of the graph: it is read from the ``Trainer`` whose
step is running (accumulation, the labels of the step, processes, the scaler of fp16), else from Accelerate's state. In
a loop without either each forward's losses count once, with a warning; under fp16 autocast, whose scaler is unknown, it
raises.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from sa_hf.errors import SparseAttentionError

IGNORED_LABEL = -100

_GUARD = "sa_hf_step"
ADVICE = (
    "compute output.loss by giving labels, or add them yourself: `with sa_hf.hf.losses.collected_losses(model) as "
    "extra: out = model(...)`, then `loss = loss + sum(extra)`"
)


@dataclass(eq=False)
class TrainerStep:
    """One micro-batch of a ``Trainer``. ``forwards`` counts those of the model in it, with a graph and without one."""

    trainer: Any
    inputs: Any
    items: Any
    forwards: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def factor(self, model: Any) -> Tensor | float:
        """What one forward's auxiliary losses weigh in the gradients of the optimizer step, before loss scaling."""
        share, divided = share_of_loss(self.trainer, model, self.inputs, self.items)
        if divided:
            share = share / _accumulation(self.trainer)
        return share / max(1, self.forwards[True] or self.forwards[False])


_STEP: ContextVar[TrainerStep | None] = ContextVar("sa_hf_step", default=None)


def share_of_loss(trainer: Any, model: Any, inputs: Any, items: Any) -> tuple[Tensor | float, bool]:
    """A micro-batch's part of the step's auxiliary loss, before what the ``Trainer`` does to a loss afterwards, and
    whether it then divides by the number of micro-batches."""

    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_items = trainer.model_accepts_loss_kwargs and items is not None
        scaled = by_items or trainer.compute_loss_func is not None
    if not scaled:
        return 1.0, True
    given = {**inputs, "num_items_in_batch": items} if isinstance(inputs, Mapping) else {}
    labelled = any(isinstance(given.get(name), Tensor) for name in ("labels", "shift_labels"))
    if items is None or not labelled:
        return 1.0 / _accumulation(trainer), False
    # The items are those of all processes, whose gradients are averaged.
    processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return share_of_step(model, given, trainer) * processes, False


def _accumulation(trainer: Any) -> int:
    return int(getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps))


def follow_trainers() -> None:
    """Have every ``Trainer`` say which micro-batch it is in; done at the first patch with learned state, never at
    import. Trainers of other libraries call this ``training_step``, too, whatever loss they make of the outputs."""
    from transformers import Trainer

    run = Trainer.training_step
    if hasattr(run, _GUARD):
        return

    @functools.wraps(run)
    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None, **more: Any) -> Any:
        with _during(TrainerStep(self, inputs, num_items_in_batch)):
            return run(self, model, inputs, num_items_in_batch, **more)

    setattr(training_step, _GUARD, True)
    Trainer.training_step = training_step


@contextmanager
def _during(step: TrainerStep) -> Iterator[None]:
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


@dataclass(eq=False)
class Delivery:
    """How the auxiliary losses of one forward reach the parameters: through ``output.loss`` where ``backward()`` comes
    by it, else through what else the model returned."""

    model: Any
    activity: Any
    names: tuple[str, ...] = ()
    step: TrainerStep | None = field(default_factory=_STEP.get)
    half: bool = False
    task: int | None = None  # the backward() that came by output.loss
    joined: Tensor | float = 0.0  # the gradient that it gives the summed auxiliary losses

    def count(self) -> None:
        if self.step is not None:
            self.step.forwards[torch.is_grad_enabled()] += 1

    def gradient(self, grad: Tensor, carrier: Any) -> Tensor:
        """What ``backward()`` adds to the summed auxiliary losses.

        The first one through a forward adds them, a later one (``retain_graph=True``) does not: of several losses that
        are made of one forward each has a backward of its own, and their sum would have them once. Of ``output.loss``
        they are a term: after another loss its backward takes back here what it adds; twice by itself, it adds them
        twice, as it does its own gradient. (Nothing says whether another loss is the same one again.)

        Args: carrier: the context of the :class:`Carrier`, which knows the first, and whether it gave them itself.
        """
        task = torch._C._current_graph_task_id()
        if carrier.first is None:
            carrier.first = task
        by_loss = self.task == task
        if by_loss and not carrier.gave:
            return torch.zeros_like(grad)
        if carrier.first != task:
            warnings.warn(
                f"a second backward() through one forward: the auxiliary losses {list(self.names)} joined the first "
                f"and count once. Call backward() on the sum of the losses; or {ADVICE}",
                stacklevel=2,
            )
            return -torch.ones_like(grad) * self.joined if by_loss else torch.zeros_like(grad)
        carrier.gave = True
        one = torch.ones_like(grad)
        if self.step is not None:
            return self._scaled(one * self.step.factor(self.model))
        shared = _accelerate_state()
        if self.half or (shared is not None and shared[1] == "fp16"):
            raise SparseAttentionError(
                f"the auxiliary losses {list(self.names)} would join a loss that is not output.loss, under fp16, where "
                f"a scaler that is not known here multiplies the loss; {ADVICE}"
            )
        if shared is not None:
            return one / shared[0]
        if not self.activity.warned:
            self.activity.warned = True
            warnings.warn(
                f"the auxiliary losses {list(self.names)} join a loss that is not output.loss: with their full weight "
                "for each forward, as nobody says here by what your loss is divided (gradient accumulation) or "
                f"multiplied. Where it is, {ADVICE}",
                stacklevel=2,
            )
        return one

    def _scaled(self, factor: Tensor) -> Tensor:
        accelerator = self.step.trainer.accelerator  # type: ignore[union-attr]  # asked for above
        if "DEEPSPEED" in str(accelerator.distributed_type) or "MEGATRON" in str(accelerator.distributed_type):
            raise SparseAttentionError(
                f"the auxiliary losses {list(self.names)} would join a loss that is not output.loss under "
                f"{accelerator.distributed_type}, whose scaling of the loss is not known here; {ADVICE}"
            )
        factor = factor / accelerator.gradient_accumulation_steps
        scaled: Tensor = factor if accelerator.scaler is None else accelerator.scaler.scale(factor)
        return scaled


def _accelerate_state() -> tuple[int, str] | None:
    """Accumulation steps and precision of an ``Accelerator`` in this process; None where there is none."""
    from accelerate.state import AcceleratorState, GradientState

    if not AcceleratorState._shared_state:
        return None
    return int(GradientState().num_steps), str(AcceleratorState().mixed_precision)


class Carrier(torch.autograd.Function):
    """A zero; its backward adds the gradient of the losses that it is given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(losses: Tensor, delivery: Delivery) -> Tensor:
        return torch.zeros_like(losses)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Delivery], output: Tensor) -> None:
        ctx.delivery, ctx.first, ctx.gave = inputs[1], None, False

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.delivery.gradient(grad, ctx), None


class Joined(torch.autograd.Function):
    """A loss with the auxiliary ones added, times their ``factor``; its backward notes that they have their gradient by
    it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, extra: Tensor, delivery: Delivery, factor: Tensor | float) -> Tensor:
        return loss + extra

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Delivery, Tensor | float], output: Tensor) -> None:
        ctx.delivery, ctx.factor = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.delivery.task, ctx.delivery.joined = torch._C._current_graph_task_id(), grad * ctx.factor
        return grad, grad, None, None


def share_of_step(model: nn.Module, given: Mapping[str, Any], trainer: Any = None) -> Tensor | float:
    """This micro-batch's part of the optimizer step's auxiliary loss.

    The Trainer divides each micro-batch's summed loss by the labels of the whole step (``num_items_in_batch``); the
    same share makes the auxiliary loss a mean over the step, not a sum that grows with the accumulation steps.

    Args: model: the one that was called, perhaps a body without a loss of its own; trainer: who counted the items.
    """
    items, labels, counted = given.get("num_items_in_batch"), given.get("labels"), given.get("shift_labels")
    if not isinstance(counted, Tensor):
        if not isinstance(labels, Tensor):
            return 1.0
        counted = labels[..., 1:] if _first_labels_left_out(model, trainer) else labels
    if items is None:
        return 1.0
    ignored = given.get("ignore_index", IGNORED_LABEL)
    share: Tensor = (counted != ignored).sum() / torch.as_tensor(items, device=counted.device)
    return share


def _first_labels_left_out(model: nn.Module, trainer: Any) -> bool:
    """Whether the items do not count each row's first label, which no position predicts."""
    if trainer is not None:
        return bool(getattr(trainer, "_loss_shifts_labels", False))  # the oldest releases count every label
    shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return shifts and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
