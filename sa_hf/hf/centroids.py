"""Routing's centroids move once per optimizer step, after it, whatever loop runs it.

Every forward in training notes its model here, and a hook that torch calls after the step of any optimizer moves the
centroids of the models that the optimizer trains: in a plain loop, under Accelerate, in any ``Trainer``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sa_hf.config import SparseAttention
from sa_hf.hf.families import root_model
from sa_hf.hf.layers import leaves
from sa_hf.patterns import centroids
from sa_hf.patterns.centroids import CentroidState

# Models in the order of their first forwards, so that all ranks reduce in the same one.
_TRAINED: list[weakref.ref[nn.Module]] = []
_HOOKS: list[Any] = []


def follow_optimizers(model: nn.Module, children: Sequence[SparseAttention]) -> None:
    """Have the centroids of a model move after each step of an optimizer that trains it."""
    if torch.compiler.is_compiling() or not centroid_layers(children):
        return
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_after_step))
    _TRAINED[:] = [known for known in _TRAINED if known() is not None]
    if all(known() is not model for known in _TRAINED):
        _TRAINED.append(weakref.ref(model))


def update_centroids(model: nn.Module) -> None:
    """Move the centroids of every routing layer by what its forwards gathered since the last call.

    Steps of torch optimizers do so by themselves; for loops with an optimizer of another kind.
    """
    from sa_hf.hf.patching import patch_of

    root = root_model(model)
    patch = patch_of(root)
    if patch is not None:
        centroids.update_centroids(centroid_layers(patch.children(root)))


def centroid_layers(children: Sequence[SparseAttention]) -> list[CentroidState]:
    """The routing layers among pattern modules, also as parts of a mixture by heads."""
    return [leaf for child in children for leaf in leaves(child) if isinstance(leaf, CentroidState)]


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for known in _TRAINED:
        model = known()
        if model is not None and any(id(parameter) in stepped for parameter in model.parameters()):
            update_centroids(model)
