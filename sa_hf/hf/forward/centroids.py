"""Routing's centroids move once per optimizer step, after it, whatever loop runs it.

Every forward in training with learned layers notes its model here, and a hook that torch calls after the step of any
optimizer moves the centroids of the models that it trains: in a plain loop, under Accelerate, in any ``Trainer``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sa_hf.config import SparseAttention
from sa_hf.hf.state.activity import Activity
from sa_hf.hf.state.layers import leaves, sparse_children
from sa_hf.hf.state.patch import patch_of
from sa_hf.hf.state.sites import root_model
from sa_hf.patterns.centroids import CentroidState
from sa_hf.patterns.centroids import update_centroids as move_centroids


@dataclass(eq=False)
class _Trained:
    """A model that had a forward in training, the names of its attention modules, and its patch's activity."""

    model: weakref.ref[nn.Module]
    names: list[str]
    activity: Activity


# In the order of their first forwards, so that all ranks reduce in the same one.
_TRAINED: list[_Trained] = []
_HOOKS: list[Any] = []


def follow_optimizers(model: nn.Module, names: list[str], activity: Activity) -> None:
    """Have the centroids of a model move after each step of an optimizer that trains it, and its forwards forgotten."""
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_after_step))
    _TRAINED[:] = [known for known in _TRAINED if known.model() is not None]
    if all(known.model() is not model or known.activity is not activity for known in _TRAINED):
        _TRAINED.append(_Trained(weakref.ref(model), names, activity))


def update_centroids(model: nn.Module) -> None:
    """Move the centroids of every routing layer by what its forwards gathered since the last call.

    Steps of torch optimizers do so by themselves; for loops with an optimizer of another kind.
    """
    root = root_model(model)
    patch = patch_of(root)
    if patch is not None:
        move_centroids(centroid_layers(patch.children(root)))


def centroid_layers(children: Sequence[SparseAttention]) -> list[CentroidState]:
    """The routing layers among pattern modules, also as parts of a mixture by heads."""
    return [leaf for child in children for leaf in leaves(child) if isinstance(leaf, CentroidState)]


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    moving: dict[int, CentroidState] = {}  # a model and one inside it have layers in common
    for known in _TRAINED:
        model = known.model()
        if model is None or not _is_trained(model, stepped):
            continue
        known.activity.forwards.forget()
        moving |= {id(layer): layer for layer in centroid_layers(sparse_children(model, known.names))}
    move_centroids(list(moving.values()))


def _is_trained(model: nn.Module, stepped: set[int]) -> bool:
    """Whether an optimizer with these parameters trains a model; of one that is frozen (prompt tuning trains what is
    put in front of it) any may."""
    parameters = list(model.parameters())
    return any(id(p) in stepped for p in parameters) or not any(p.requires_grad for p in parameters)
