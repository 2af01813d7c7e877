"""``figures``: what the layers of a patched model have learned or routed, as plain numbers."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

from sa_hf.config import SparseAttention
from sa_hf.hf.state.layers import leaves
from sa_hf.hf.state.patch import required_patch
from sa_hf.hf.state.sites import root_model
from sa_hf.patterns.centroids import CentroidState

Figures: TypeAlias = dict[str, Any]


def figures(model: nn.Module) -> dict[int | str, Figures]:
    """What is learned or routed, layer by layer: ``{layer: {figure: number}}``.

    A layer is its index in the stack; where a model has several stacks, "encoder.0", "decoder.0". Layers of static
    patterns, and dense ones, are not listed. In a layer whose heads run several patterns each name begins with
    ``part<i>_``. ``None`` is a figure that needs a forward first: ``model(**inputs)``, then ask again.

    - SparseBERT: ``mask_density``, kept pairs over those of dense attention, of the mask as evaluation reads it: at the
      lengths of the last forward, before any at ``mask_length`` tokens.
    - Expire-Span, of the last forward: ``mean_span`` and ``max_span`` in tokens, ``tokens_kept`` of a sequence.
    - Routing, of the last forward: ``cluster_sizes``, tokens (queries and keys) of each cluster, a list for each key
      head; ``cluster_min``, ``cluster_max``, and ``cluster_entropy`` in nats. Bidirectional layers have them of a
      forward in training mode.
    - block_topk, of the last forward: ``blocks_chosen``, of each query (or query block) besides those always read, and
      ``blocks_back``, how many blocks from its own they lie; both are means.

    Raises:
        SparseAttentionError: the model is not patched.
    """
    root = root_model(model)
    patch = required_patch(root, "figures")
    several = len(patch.sites.stacks) > 1
    found: dict[int | str, Figures] = {}
    for site, child in patch.sparse_sites(root):
        of_layer = _of_layer(child)
        if of_layer:
            index = site.spec.layer_idx
            found[f"{site.stack}.{index}" if several else index] = of_layer
    return found


def _of_layer(child: SparseAttention) -> Figures:
    parts = list(leaves(child))
    if parts == [child]:
        return _of_part(child)
    return {f"part{i}_{name}": value for i, part in enumerate(parts) for name, value in _of_part(part).items()}


def _of_part(part: SparseAttention) -> Figures:
    found: Figures = {**dict.fromkeys(part.figure_names), **part.figures()}
    if isinstance(part, CentroidState):
        found["cluster_sizes"] = part.cluster_sizes()
    return found
