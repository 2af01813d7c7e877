"""How many pairs the layers of a patched model read, counted where they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.config import SparseAttention
from sa_hf.hf.patching.summary import summary
from sa_hf.hf.state.layers import active_child
from sa_hf.hf.state.patch import patch_of
from sa_hf.hf.state.sites import root_model

COLUMNS = 256  # width of the values that the layers run on


def densities(model: nn.Module, ids: Tensor) -> list[float]:
    """Kept pairs over those of dense attention, of each layer on one sequence ``ids [1, n]``: what ``summary`` counts,
    and where that depends on the data, what :func:`pairs_read` finds. All 1 for a model that is not patched."""
    if patch_of(root_model(model)) is None:
        return [1.0] * int(root_model(model).config.num_hidden_layers)
    layers = summary(model, ids.shape[1]).layers
    found = [layer.density for layer in layers]
    if None in found:
        read = pairs_read(model, ids)
        found = [read[layer.index] if known is None else known for layer, known in zip(layers, found, strict=True)]
    return [float(density) for density in found if density is not None]


@torch.no_grad()
def pairs_read(model: nn.Module, ids: Tensor) -> dict[int, float]:
    """Pairs that each sparse layer reads of ``ids [1, n]``, over those of dense attention, ``{layer: share}``.

    Each layer runs again on unit vectors as its values, so that its output is its weights; with a scale of 0 a pair
    that is read has one above 0, however unlike query and key are (which pairs are read does not hang on the scale).
    """
    root = root_model(model)
    patch = patch_of(root)
    if patch is None:
        return {}
    found: dict[int, float] = {}
    training = model.training
    model.eval()
    with _counted(root, patch.sites.all_sites, found):
        model(input_ids=ids)
    model.train(training)
    return found


@contextmanager
def _counted(root: nn.Module, sites: list[Any], found: dict[int, float]) -> Iterator[None]:
    handles = []
    for site in sites:
        child = active_child(root.get_submodule(site.name))
        if isinstance(child, SparseAttention):
            handles.append(child.register_forward_hook(_counter(site.spec, found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counter(spec: Any, found: dict[int, float]) -> Any:
    def count(child: SparseAttention, given: tuple[Any, ...], output: Tensor) -> None:
        inputs = given[0]
        heads, length = inputs.key.shape[1], inputs.key.shape[2]
        kept = 0
        units = torch.eye(length, dtype=inputs.value.dtype, device=inputs.value.device)
        for columns in units.split(COLUMNS, dim=1):
            value = columns.expand(1, heads, -1, -1).contiguous()
            # Not through __call__: this hook would run again.
            weights = child.forward(replace(inputs, value=value, scale=0.0))
            kept += int((weights > 0).sum())
        pairs = length * (length + 1) // 2 if spec.causal else length * length
        found[spec.layer_idx] = kept / (pairs * inputs.query.shape[1])

    return count
