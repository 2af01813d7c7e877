"""The same pairs in taller tiles, for torch's flash op: it multiplies 32 rows at a time for tiles of 64 rows, 64 for
those of 192 or more, 256 for those of 768 or more.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from sa_hf.ops.native.blocks import mask_table
from sa_hf.ops.parts import FULL, UNBOUNDED, BlockLayout

# Rows of tiles of 64 that become one (512 keys, 2 cores: 113 GF/s for one, 142 for 4, 160 for 16). Pairs computed for
# each listed one, at most: joined windows, which compute 1.1 to 1.3 for one, win nothing.
HEIGHTS = (16, 4)
WASTE = 1.06
LARGEST_MASKS = 2**26  # bytes

_KNOWN: WeakKeyDictionary[BlockLayout, BlockLayout | None] = WeakKeyDictionary()


def taller(layout: BlockLayout) -> BlockLayout:
    """Where neighbouring rows of tiles read nearly the same keys, a layout of the same pairs with several rows in one
    tile; else the layout itself. Remembered while the layout lives."""
    if layout not in _KNOWN:
        found = (_joined_rows(layout, height) for height in HEIGHTS)
        _KNOWN[layout] = next((tall for tall in found if tall is not None), None)
    return _KNOWN[layout] or layout


def _joined_rows(layout: BlockLayout, height: int) -> BlockLayout | None:
    """The layout with ``height`` rows of tiles in one; None where that computes too much or cannot be."""
    entries = int(layout.row_start[-1])
    if layout.key_range is not None or layout.num_query_blocks < 2 * height or entries == 0:
        return None
    device = layout.row_start.device
    row = torch.repeat_interleave(torch.arange(len(layout.row_start) - 1, device=device), layout.row_start.diff())
    lists, block = row // layout.num_query_blocks, row % layout.num_query_blocks
    tall_blocks = -(-layout.num_query_blocks // height)
    tall_row = lists * tall_blocks + block // height
    code = tall_row * layout.num_key_blocks + layout.columns[:entries]
    tiles, tile = torch.unique(code, return_inverse=True)
    if len(tiles) * height > WASTE * entries:
        return None
    mask_id, masks = mask_table(layout, row)
    nothing = len(masks)
    members = torch.full((len(tiles), height), nothing, dtype=torch.int64, device=device)
    members[tile, block % height] = mask_id
    past_end = (tiles // layout.num_key_blocks % tall_blocks)[:, None] * height + torch.arange(height, device=device)
    members.masked_fill_(past_end >= layout.num_query_blocks, 0)  # rows that are cut off: whatever is computed
    kinds, kind = torch.unique(members, dim=0, return_inverse=True)
    partial = (kinds != 0).any(1)
    number = torch.where(partial, partial.cumsum(0) - 1, FULL)
    if int(partial.sum()) * height * layout.block_q * layout.block_k > LARGEST_MASKS:
        return None
    masks = torch.cat([masks, torch.zeros_like(masks[:1])])
    counts = torch.bincount(tiles // layout.num_key_blocks, minlength=layout.batch * layout.heads * tall_blocks)
    return replace(
        layout,
        block_q=height * layout.block_q,
        row_start=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        columns=(tiles % layout.num_key_blocks).int(),
        kind=number[kind].int(),
        masks=masks[kinds[partial]].flatten(1, 2),
        band=UNBOUNDED,
        longest=None,
    )
