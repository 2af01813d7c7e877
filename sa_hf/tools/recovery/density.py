"""How many pairs the layers of a patched model read, counted where they are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sa_hf.hf.patching.summary import summary
from sa_hf.hf.state.patch import patch_of
from sa_hf.hf.state.sites import root_model
from sa_hf.tools.seen import attended, inputs_seen


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
    """Pairs that each sparse layer reads of ``ids [1, n]``, over those of dense attention, ``{layer: share}``."""
    root = root_model(model)
    patch = patch_of(root)
    if patch is None:
        return {}
    sparse = [(site.spec, child) for site, child in patch.sparse_sites(root)]
    seen = inputs_seen(root, (child for _, child in sparse), ids)
    found: dict[int, float] = {}
    for spec, child in sparse:
        inputs = seen[id(child)]
        length = inputs.key.shape[2]
        pairs = length * (length + 1) // 2 if spec.causal else length * length
        found[spec.layer_idx] = int((attended(child, inputs) > 0).sum()) / (pairs * inputs.query.shape[1])
    return found
