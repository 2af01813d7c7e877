"""Which tiles of a block layout a region of (query, key) positions touches, by arithmetic on the region's bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.layer import Geometry
from sa_hf.ops.parts import Band


def tiles_of(
    geometry: Geometry, head: Tensor | int, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor
) -> Tensor:
    """The tiles that rectangles touch, int64 ``[E, 3]`` (list, query block, key block), repeats possible.

    A rectangle is ``q_low <= i < q_high``, ``k_low <= j < k_high`` in positions, int64 ``[R]`` each; it is cut to
    the geometry's queries and keys. ``head`` is its list (one for all, or ``[R]``).
    """
    lists = torch.as_tensor(head).expand_as(q_low)
    offset, block = geometry.query_offset, geometry.block
    q_low, q_high = (q_low - offset).clamp(min=0), (q_high - offset).clamp(max=geometry.query_length)
    k_low, k_high = k_low.clamp(min=0), k_high.clamp(max=geometry.key_length)
    held = (q_low < q_high) & (k_low < k_high)
    lists, q_low, q_high, k_low, k_high = (x[held] for x in (lists, q_low, q_high, k_low, k_high))
    q_first, k_first = q_low // block, k_low // block
    q_count, k_count = (q_high - 1) // block - q_first + 1, (k_high - 1) // block - k_first + 1
    total = q_count * k_count
    which = torch.repeat_interleave(total)
    inner = torch.arange(len(which)) - (total.cumsum(0) - total)[which]
    return torch.stack(
        [lists[which], q_first[which] + inner // k_count[which], k_first[which] + inner % k_count[which]], dim=1
    )


def query_tiles(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """First position, and the one after the last, of every query tile: int64 ``[query blocks]`` each."""
    low = torch.arange(geometry.query_offset, geometry.key_length, geometry.block)
    return low, (low + geometry.block).clamp(max=geometry.key_length)


def band_tiles(geometry: Geometry, band: Band) -> Tensor:
    """The tiles that a band touches, int64 ``[E, 3]`` in list 0."""
    low, high = query_tiles(geometry)
    n = geometry.key_length
    k_low = torch.zeros_like(low) if band.left is None else low - band.left
    k_high = torch.full_like(high, n) if band.right is None else high + band.right
    return tiles_of(geometry, 0, low, high, k_low, k_high)


def within_band(geometry: Geometry, tiles: Tensor, band: Band) -> Tensor:
    """Whether every pair of a tile lies in the band, bool ``[E]`` (pairs past the end count as inside)."""
    low, high = query_tiles(geometry)
    q_low, q_high = low[tiles[:, 1]], high[tiles[:, 1]] - 1
    k_low = tiles[:, 2] * geometry.block
    k_high = (k_low + geometry.block).clamp(max=geometry.key_length) - 1
    inside = torch.ones(len(tiles), dtype=torch.bool)
    if band.left is not None:
        inside &= q_high - k_low <= band.left
    if band.right is not None:
        inside &= k_high - q_low <= band.right
    return inside


def on_lists(tiles: Tensor, lists: int) -> Tensor:
    """Tiles of list 0 repeated on ``lists`` lists."""
    repeated = tiles.repeat(lists, 1)
    repeated[:, 0] = torch.arange(lists).repeat_interleave(len(tiles))
    return repeated
