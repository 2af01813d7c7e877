"""Keys that the indexer of a layer left dense has chosen: in the attention of its model the layer hides the others by
itself, but to any other attention function it hands the choice on, ours among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of each query ``[B, queries, chosen]`` (DeepSeek Sparse Attention), and of blocks (MiniMax M3).
_KEYS, _BLOCKS = "indices", "block_indices"


def with_chosen_keys(module: Any, mask: Any, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Any:
    """The mask without what the layer's indexer did not choose; takes the choice out of ``kwargs``."""
    if getattr(module, "indexer", None) is None and _KEYS not in kwargs:
        return mask
    chosen, blocks = kwargs.pop(_KEYS, None), kwargs.pop(_BLOCKS, None)
    if isinstance(chosen, Tensor) and mask is not None:
        left = torch.ones(*chosen.shape[:2], key.shape[2], dtype=torch.bool, device=chosen.device)
        left = left.scatter(-1, chosen.long(), False)[:, None]
        return mask & ~left if mask.dtype == torch.bool else mask.masked_fill(left, torch.finfo(mask.dtype).min)
    if isinstance(blocks, Tensor):
        queries, keys = query.shape[2], key.shape[2]
        at = kwargs.get("position_ids")
        at = torch.arange(keys - queries, keys, device=query.device)[None] if at is None else at
        at = at.expand(query.shape[0], -1)
        return module.indexer.build_block_mask(blocks, mask, keys, query.dtype, query.device, at)
    return mask
