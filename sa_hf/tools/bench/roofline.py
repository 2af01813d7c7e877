"""The paper roofline: operations and bytes of a pattern, and the least time that they can take.

Floating-point operations of attention per kept pair and head: forward ``4 D`` (two products), backward ``10 D`` (five).
Bytes: every input read once and every output written once. A tile engine executes whole tiles and reads each listed
K and V tile once per query tile, the offsets kernels a row of K and of V per pair: that gives the second estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sa_hf.layer import Geometry
from sa_hf.ops.counts import kept_pairs
from sa_hf.ops.parts import OffsetsPart, Part, SegmentPart
from sa_hf.ops.triton.lists import segment_lists
from sa_hf.patterns.base import StaticPatternConfig, finished_plan

FORWARD_FLOPS_PER_PAIR = 4
BACKWARD_FLOPS_PER_PAIR = 10


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do: TFLOP/s of matrix products, GB/s of device memory and of the L2 cache."""

    name: str
    tflops: float
    memory_gbs: float
    l2_gbs: float


# Vendor datasheet of the H200 SXM (dense bf16, HBM3e); the L2 figure is the one the tile estimate of this project
# assumes (5.5 TB/s). They serve the paper table only; the suite measures its own ceilings on the card it runs on.
H200_DATASHEET = Ceilings("H200 SXM datasheet", 989.0, 4800.0, 5500.0)


@dataclass(frozen=True)
class Work:
    """Work of one attention call, all heads and the whole batch."""

    pairs: int
    executed_pairs: int
    flops_forward: float
    flops_backward: float
    bytes_forward: float
    bytes_backward: float
    tile_bytes: float

    def floor_ms(self, ceilings: Ceilings, *, backward: bool = False) -> float:
        """The least time: the larger of operations over their rate and bytes over memory bandwidth."""
        flops = self.flops_backward if backward else self.flops_forward
        moved = self.bytes_backward if backward else self.bytes_forward
        return max(flops / ceilings.tflops / 1e9, moved / ceilings.memory_gbs / 1e6)

    def tile_ms(self, ceilings: Ceilings, head_dim: int) -> float:
        """What the shipped tiles should take forward: executed pairs at the matrix rate, or K and V tiles from L2."""
        executed = self.executed_pairs * FORWARD_FLOPS_PER_PAIR * head_dim
        tiles = max(executed / ceilings.tflops / 1e9, self.tile_bytes / ceilings.l2_gbs / 1e6)
        return max(tiles, self.floor_ms(ceilings))


def work(
    config: StaticPatternConfig, length: int, *, causal: bool, batch: int, num_heads: int, num_key_value_heads: int,
    head_dim: int, bytes_per_element: int = 2, block: int = 64,
) -> Work:  # fmt: skip
    """Count a pattern's pairs and tiles from its plan (no n x n tensor)."""
    geometry = Geometry(length, length, tuple(range(num_heads)), num_heads, 0, causal, block=block)
    plan = finished_plan(config, geometry, torch.device("cpu"))
    pairs = kept_pairs(plan, length, num_heads) * batch
    tiles = [_tile_work(p, num_heads) for p in plan]
    query_bytes = batch * num_heads * length * head_dim * bytes_per_element
    key_bytes = batch * num_key_value_heads * length * head_dim * bytes_per_element
    stats = batch * num_heads * length * 4
    return Work(
        pairs=pairs,
        executed_pairs=sum(executed for executed, _ in tiles) * batch,
        flops_forward=float(FORWARD_FLOPS_PER_PAIR * head_dim * pairs),
        flops_backward=float(BACKWARD_FLOPS_PER_PAIR * head_dim * pairs),
        bytes_forward=2.0 * query_bytes + 2.0 * key_bytes + stats,
        bytes_backward=4.0 * query_bytes + 4.0 * key_bytes + 2.0 * stats,
        tile_bytes=2.0 * sum(rows for _, rows in tiles) * batch * head_dim * bytes_per_element,
    )


def _tile_work(part: Part, num_heads: int) -> tuple[int, int]:
    """Pairs that whole tiles compute, and rows of K (as many of V) that they read, over all heads.

    Tiles are those of the lists that the kernels run: the side of a segment part's depends on its segments.
    """
    if isinstance(part, OffsetsPart):
        pairs = sum(len(o) for o in part.offsets) * part.length * (num_heads // len(part.offsets))
        return pairs, pairs  # a row for each pair
    if isinstance(part, SegmentPart):
        lists = segment_lists(part, torch.device("cpu"))
        tiles, tile_q, tile_k = len(lists.columns) * num_heads, lists.tile_q, lists.tile_k
    else:
        layout = part.layout
        tiles, tile_q, tile_k = len(layout.columns) * (num_heads // layout.heads), layout.block_q, layout.block_k
    return tiles * tile_q * tile_k, tiles * tile_k
