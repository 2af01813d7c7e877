"""Training with the Hugging Face ``Trainer``: a callback for any of them, and one set up whole."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.forward.centroids import update_centroids
from sa_hf.hf.forward.losses import collected_losses, total_losses
from sa_hf.hf.state.patch import patch_of
from sa_hf.hf.state.sites import root_model
from sa_hf.hf.state.step import share_of_loss
from sa_hf.hf.training.distillation import Distillation
from sa_hf.hf.training.groups import parameter_groups
from sa_hf.hf.training.kept_teacher import KeptTeacher

DEFAULT_SPARSE_LR = 1e-2


def training_figures(model: nn.Module) -> dict[str, float]:
    """What a patched model reports of its last forward, flat: ``{"sparse/<name>": value}``.

    The auxiliary losses as they join the model's loss, times their coefficients, and the mean over the layers of each
    figure of the patterns (spans, density, cluster entropy). Empty for a model that is not patched.
    """
    figures = {f"sparse/{name}": float(loss.detach()) for name, loss in total_losses(_layers(model)).items()}
    by_name: dict[str, list[float]] = defaultdict(list)
    for module in _layers(model):
        for name, value in module.figures().items():
            by_name[name].append(value)
    return figures | {f"sparse/{name}": sum(values) / len(values) for name, values in by_name.items()}


class SparseAttentionCallback(TrainerCallback):
    """For any ``Trainer``: logs auxiliary losses and figures as figures of their own, and moves centroids.

    Centroids (Routing) move once per optimizer step, after it: an update inside a forward that is recomputed under
    gradient checkpointing would give wrong gradients.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs.get("model")
        if model is not None:
            update_centroids(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model")
        # The record of a training step carries "loss"; those of evaluation and of the run's end do not.
        if model is None or logs is None or "loss" not in logs:
            return
        figures = training_figures(model)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


class SparseTrainer(Trainer):
    """A ``Trainer`` whose optimizer gives masks and spans a learning rate of their own, without weight decay.

    The auxiliary losses are in the figure of the loss under ``label_smoothing_factor`` and ``compute_loss_func``, too,
    where a stock Trainer keeps the labels, and so the loss that they would join, from the model. A data set's column
    ``sequence_ids`` (packed rows) reaches the model, where a stock one drops it unless ``remove_unused_columns=False``.

    Args:
        sparse_lr: learning rate of the learned sparse state; the scheduler scales it along with the other rate.
        distill: "logits", "outputs" or "both": training also follows the model's own dense attention, with the weights
            it has now (:class:`~sa_hf.hf.training.distillation.Distillation`); one dense forward a step. None: no.
        teacher: a folder of :func:`~sa_hf.hf.training.distillation.keep_teacher`, of this model on these rows: no dense
            forward then. With ``distill="logits"`` alone.
        distill_weight: what the distance to it is multiplied by; the task's loss keeps its weight of 1.

    Raises:
        SparseAttentionError: distillation of a model that is not patched, of a ``model_init``, or with another value.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, *args: Any, sparse_lr: float = DEFAULT_SPARSE_LR, distill: str | None = None, distill_weight: float = 1.0,
        teacher: str | Path | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.sparse_lr = sparse_lr
        self.distill_weight = _weight(distill_weight)
        if distill is not None and self.model_init is not None:
            raise SparseAttentionError(
                f"distill={distill!r} takes the weights of a model that there is: give SparseTrainer a model, not a "
                "model_init"
            )
        if distill is None and teacher is not None:
            raise SparseAttentionError(f"teacher={str(teacher)!r} is read by distill='logits', and distill is None")
        kept = None if teacher is None else KeptTeacher(teacher)
        self.distillation = None if distill is None else Distillation(self.model, distill, kept)
        # First in the line, so that the figures are in the record before anything reports it.
        self.callback_handler.callbacks.insert(0, SparseAttentionCallback())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trained = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(trained, self.args.weight_decay, sparse_lr=self.sparse_lr)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _set_signature_columns_if_needed(self) -> None:
        # The columns that the Trainer keeps are the names in the forward's signature; our hook takes this one.
        super()._set_signature_columns_if_needed()
        if "sequence_ids" not in self._signature_columns:
            self._signature_columns.append("sequence_ids")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The Trainer's, with the auxiliary losses added where it is not the model that computes the loss, and in
        training the distance to the dense teacher."""
        if self.distillation is None or not model.training:
            return self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # the Trainer takes labels out of `inputs`
        with self.accelerator.autocast():
            taught = self.distillation.teach(self.model, given)
        with self.distillation.outputs_of(self.model) as outputs:
            loss, answer = self._own_loss(model, inputs, True, num_items_in_batch)
        share, _ = share_of_loss(self, root_model(self.model), given, num_items_in_batch)
        distance = self.distillation.loss(answer, outputs, taught, given) * (self.distill_weight * share)
        loss = loss + distance.to(device=loss.device, dtype=loss.dtype)
        return (loss, answer) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's; a record of a training step also has the last distance to the teacher."""
        if self.distillation is not None and "loss" in logs:
            logs.update(self.distillation.figures)
        super().log(logs, *args, **kwargs)

    def _own_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, items: torch.Tensor | int | None
    ) -> Any:
        patch = patch_of(root_model(self.model))
        if patch is None or (self.label_smoother is None and self.compute_loss_func is None):
            return super().compute_loss(model, inputs, return_outputs, items)
        given = dict(inputs)
        with collected_losses(self.model) as extra:
            loss, outputs = super().compute_loss(model, inputs, True, items)
        if extra:
            share, _ = share_of_loss(self, root_model(self.model), given, items)
            loss = loss + sum((value * share).to(device=loss.device, dtype=loss.dtype) for value in extra)
        return (loss, outputs) if return_outputs else loss


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise SparseAttentionError(f"distill_weight={value!r} must be a number >= 0; nearest: 1.0")
    return float(value)


def _layers(model: nn.Module) -> list[SparseAttention]:
    root = root_model(model)
    patch = patch_of(root)
    return [] if patch is None else patch.children(root)
