"""``freeze_masks``: learned SparseBERT masks become fixed ones that run sparse."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import nn

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.patching.sparse_model import enable_saving
from sa_hf.hf.state.assignment import HEADS, LayerEntry, assignment_to_dict
from sa_hf.hf.state.layers import leaves
from sa_hf.hf.state.patch import patch_of
from sa_hf.hf.state.sites import root_model
from sa_hf.patterns.sparsebert import SparseBertAttention, SparseBertAttentionConfig

Model = TypeVar("Model", bound=nn.Module)


def freeze_masks(model: Model) -> Model:
    """Fix every learned mask at what evaluation keeps now (logit above 0); from here on it runs sparse.

    In place, saved with the model, and with the same outputs as the evaluation of the learned mask. Masks that are
    frozen already stay; the logits go, so an optimizer made before holds parameters that the model no longer has, and
    an adapter no longer fits a base whose masks are learned: with PEFT, ``merge_and_unload()`` first.

    Raises:
        SparseAttentionError: the model has no layer with a learned mask.
    """
    root = root_model(model)
    patch = patch_of(root)
    children = [] if patch is None else patch.children(root)
    masks = [leaf for child in children for leaf in leaves(child) if isinstance(leaf, SparseBertAttention)]
    if patch is None or not masks:
        raise SparseAttentionError(
            f"this {type(root).__name__} has no learned mask to freeze; patch_model(model, 'sparsebert') and training "
            "come first"
        )
    for mask in masks:
        mask.freeze()
    for entries in patch.assignment.values():
        for layer, entry in entries.items():
            entries[layer] = _frozen_entry(entry)
    root.config.sa_hf = assignment_to_dict(patch.assignment)
    enable_saving(root)  # the models inside, whose configs may be their own, save the frozen masks, too
    return model


def _frozen_entry(entry: LayerEntry) -> LayerEntry:
    if isinstance(entry, SparseAttentionConfig):
        return _frozen(entry)
    return {HEADS: {heads: _frozen(config) for heads, config in entry[HEADS].items()}}


def _frozen(config: SparseAttentionConfig) -> SparseAttentionConfig:
    return replace(config, frozen=True) if isinstance(config, SparseBertAttentionConfig) else config
