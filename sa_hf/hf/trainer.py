"""Training with the Hugging Face ``Trainer``: a callback for any of them, and one set up whole."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sa_hf.hf.centroids import update_centroids
from sa_hf.hf.families import root_model
from sa_hf.hf.losses import total_losses
from sa_hf.hf.patching import patch_of
from sa_hf.hf.training import parameter_groups
from sa_hf.patterns.base import SparseAttention

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

    Args:
        sparse_lr: learning rate of the learned sparse state; the scheduler scales it along with the other rate.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, sparse_lr: float = DEFAULT_SPARSE_LR, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparse_lr = sparse_lr
        # First in the line, so that the figures are in the record before anything reports it.
        self.callback_handler.callbacks.insert(0, SparseAttentionCallback())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trained = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(trained, self.args.weight_decay, sparse_lr=self.sparse_lr)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer


def _layers(model: nn.Module) -> list[SparseAttention]:
    root = root_model(model)
    patch = patch_of(root)
    return [] if patch is None else patch.children(root)
