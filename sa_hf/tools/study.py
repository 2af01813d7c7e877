"""The SparseBERT study: which diagonals of attention matter (Shi et al. 2021, section 3), and what a mask has learned.

from sa_hf.tools.study import diagonal_study, format_study
print(format_study(diagonal_study(model, batches, distances=range(8))))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.patching.patch import patch_model
from sa_hf.hf.patching.sparse_model import unpatch_model
from sa_hf.hf.state.layers import leaves
from sa_hf.hf.state.patch import patch_of
from sa_hf.hf.state.sites import root_model
from sa_hf.patterns.sparsebert import SparseBertAttention, SparseBertAttentionConfig

BAR = 40  # characters of the longest bar of a printed study


@dataclass(frozen=True)
class DiagonalEffect:
    """The loss without the pairs at one distance (causal: ``i - j``, else ``|i - j|``), and how far it rose."""

    distance: int
    loss: float
    increase: float


@dataclass(frozen=True)
class MaskReport:
    """One head of one learned mask: kept pairs over dense ones, and per distance the chance to keep one."""

    layer: int
    head: int
    density: float
    probability: tuple[float, ...]


@torch.no_grad()
def diagonal_study(
    model: nn.Module, batches: Iterable[dict[str, Any]], distances: Sequence[int], max_length: int
) -> list[DiagonalEffect]:
    """Leave out one diagonal at a time, in all layers and heads, and measure the loss.

    Args:
        model: a dense Transformers model; it is patched for the study and restored after it.
        batches: keyword arguments of the model, with labels; the loss is the mean over them.
        distances: the diagonals to leave out, each in ``[0, max_length)``.
        max_length: at least the length of the longest batch.

    Returns:
        One entry per distance, the largest increase first.

    Raises:
        SparseAttentionError: the model is patched already, a distance is out of range, or a batch gives no loss.
    """
    root, given = root_model(model), list(batches)
    if patch_of(root) is not None:
        raise SparseAttentionError("the study needs the dense model, and this one is patched; call unpatch_model first")
    wrong = [d for d in distances if not 0 <= d < max_length]
    if wrong or not given:
        raise SparseAttentionError(
            f"distance {wrong[0]} lies outside [0, max_length) = [0, {max_length}); nearest: "
            f"{min(max(wrong[0], 0), max_length - 1)}"
            if wrong
            else "the study needs at least one batch"
        )
    training = root.training
    patch_model(root, SparseBertAttentionConfig(mask_length=max_length, frozen=True))
    root.eval()
    try:
        masks = _masks(root)
        whole = _mean_loss(root, given)
        effects = []
        for distance in distances:
            for mask in masks:
                if mask.kept is not None:
                    mask.kept.fill_(True)[:, distance] = False
            loss = _mean_loss(root, given)
            effects.append(DiagonalEffect(distance, loss, loss - whole))
    finally:
        unpatch_model(root)
        root.train(training)
    return sorted(effects, key=lambda effect: -effect.increase)


def _mean_loss(root: nn.Module, batches: list[dict[str, Any]]) -> float:
    losses = [root(**batch).loss for batch in batches]
    if any(loss is None for loss in losses):
        raise SparseAttentionError("a batch of the study gave no loss; add labels")
    return float(torch.stack(losses).mean())


def mask_report(model: nn.Module, length: int) -> list[MaskReport]:
    """What each learned mask of a patched model keeps at a length (in evaluation), head by head.

    Raises:
        SparseAttentionError: the model has no learned mask.
    """
    rows = []
    for mask in _masks(root_model(model)):
        kept = mask.mask(length).sum((1, 2))
        dense = length * (length + 1) // 2 if mask.spec.causal else length * length
        probability = diagonal_probabilities(mask)
        for index, head in enumerate(mask.heads):
            chances = tuple(probability[index].tolist())
            rows.append(MaskReport(mask.spec.layer_idx, head, int(kept[index]) / dense, chances))
    return rows


def diagonal_probabilities(mask: SparseBertAttention) -> Tensor:
    """The chance to keep a pair by distance, fp32 ``[H, mask_length]``; an unstructured mask's mean along diagonals."""
    owner = mask.owner
    table = owner.keep_table().float() if owner.logits is None else torch.sigmoid(owner.logits.detach().float())
    if table.dim() == 2:
        return table
    length = table.shape[-1]
    i = torch.arange(length, device=table.device)
    distance = (i[:, None] - i[None, :]).abs().flatten()
    if mask.spec.causal:
        table = table.tril()
        distance = torch.where(i[:, None] >= i[None, :], i[:, None] - i[None, :], length).flatten()
    sums = table.new_zeros(len(table), length + 1).index_add_(1, distance, table.flatten(1))
    return sums[:, :length] / torch.bincount(distance, minlength=length + 1)[:length]


def _masks(root: nn.Module) -> list[SparseBertAttention]:
    patch = patch_of(root)
    children = [] if patch is None else patch.children(root)
    masks = [leaf for child in children for leaf in leaves(child) if isinstance(leaf, SparseBertAttention)]
    if not masks:
        raise SparseAttentionError("the model has no learned mask; patch_model(model, 'sparsebert') comes first")
    return masks


def format_study(effects: Sequence[DiagonalEffect]) -> str:
    """The study as text: one line per distance, in order, a bar for the rise of the loss."""
    largest = max((effect.increase for effect in effects), default=0.0)
    lines = []
    for effect in sorted(effects, key=lambda e: e.distance):
        bar = "#" * round(BAR * max(effect.increase, 0.0) / largest) if largest > 0 else ""
        lines.append(f"{effect.distance:6d}  {effect.loss:9.4f}  {effect.increase:+9.4f}  {bar}".rstrip())
    return "\n".join(["  left      loss       rise", *lines])
