"""BigBird: window, random and global blocks (Zaheer et al., NeurIPS 2020, arXiv 2007.14062).

Positions are cut into blocks of ``block_size``. A query block attends its own block, ``num_window_blocks`` around
itself, the global blocks, and ``num_random_blocks`` drawn per (seed, layer, head, query block); the global query
blocks attend everything. Causal: the same set with ``j <= i``, random blocks drawn from the past, leading global
blocks alone. With ``num_extra_tokens`` learned global tokens join the sequence (the paper's ETC; encoders only).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_hf.config import check_choice, check_integer, register_pattern
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import Geometry, LayerSpec
from sa_hf.ops.layout import Predicate, build_layout
from sa_hf.ops.parts import Band, BlockPart, Part
from sa_hf.ops.random import splitmix64, splitmix64_tensor
from sa_hf.ops.reads import Run, positions_of
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.tiles import band_tiles, on_lists, tiles_of

# The smallest tile of the GPUs' matrix units, whatever the block size; a power of two, as that, so that they nest.
MIN_TILE = 16
# Extra tokens read and are read by everything, in every layer: 4096 cost what dense attention over as many does.
MAX_EXTRA_TOKENS = 4096


@register_pattern
@dataclass(frozen=True, kw_only=True)
class BigBirdAttentionConfig(StaticPatternConfig):
    """BigBird. Every count may be 0, which switches that part off; the own block is always attended.

    Args:
        block_size: positions per block, a power of two. Below 16 it costs more than its pairs: tiles stay at 16.
        num_window_blocks: blocks around the own one, itself included; odd, or 0.
        num_random_blocks: random blocks per query block, never one already attended.
        global_blocks: "ends" (half at each end, as the Hugging Face model) or "first" (leading ones, as the paper).
        num_global_blocks: global blocks; even for "ends".
        num_extra_tokens: learned global tokens in front of the sequence (ETC).
    """

    name: ClassVar[str] = "bigbird"

    block_size: int = 64
    num_window_blocks: int = 3
    num_random_blocks: int = 3
    global_blocks: str = "ends"
    num_global_blocks: int = 2
    num_extra_tokens: int = 0

    def validate(self) -> None:
        check_integer(self, "block_size", minimum=1)
        for field in ("num_window_blocks", "num_random_blocks", "num_global_blocks"):
            check_integer(self, field, minimum=0)
        check_integer(self, "num_extra_tokens", minimum=0, maximum=MAX_EXTRA_TOKENS)
        check_choice(self, "global_blocks", ("ends", "first"))
        if self.block_size & (self.block_size - 1):
            below = 1 << (self.block_size.bit_length() - 1)
            raise SparseAttentionError(
                f"bigbird.block_size={self.block_size} must be a power of two, so that "
                f"tiles and blocks nest; nearest: {below} or {2 * below}"
            )
        if self.num_window_blocks and self.num_window_blocks % 2 == 0:
            raise SparseAttentionError(
                f"bigbird.num_window_blocks={self.num_window_blocks} must be odd (the own block and as many on either "
                f"side) or 0; nearest: {self.num_window_blocks - 1} or {self.num_window_blocks + 1}"
            )
        if self.global_blocks == "ends" and self.num_global_blocks % 2:
            raise SparseAttentionError(
                f"bigbird.num_global_blocks={self.num_global_blocks} must be even with global_blocks='ends' (half at "
                f"each end); nearest: {self.num_global_blocks - 1} or {self.num_global_blocks + 1}, or "
                "global_blocks='first'"
            )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {"paper": {"block_size": 64, "num_window_blocks": 3, "num_random_blocks": 3, "num_global_blocks": 2}}

    @property
    def extra_tokens(self) -> int:
        return self.num_extra_tokens

    def check_layer(self, spec: LayerSpec) -> None:
        if self.num_extra_tokens and spec.causal:
            raise SparseAttentionError(
                f"bigbird.num_extra_tokens={self.num_extra_tokens} in causal layer {spec.layer_idx}: they attend "
                "everything and serve encoders only; nearest: num_extra_tokens=0 with num_global_blocks >= 1"
            )

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        q_block, k_block = i // self.block_size, j // self.block_size
        kept = self._near_or_global(q_block, k_block, geometry)
        table = self._random_blocks(geometry).to(i.device)
        for column in range(table.shape[2]):
            kept = kept | (table[head, q_block, column] == k_block)
        return kept

    def named_parts(self, geometry: Geometry) -> dict[str, Predicate]:
        size, half = self.block_size, self.num_window_blocks // 2
        return {
            "window": lambda head, i, j: (i // size - j // size).abs() <= half,
            "random": lambda head, i, j: ~self._near_or_global(i // size, j // size, geometry),
            "global": lambda head, i, j: self._near_or_global(i // size, j // size, geometry),
        }

    def same_for_all_heads(self, geometry: Geometry) -> bool:
        return self.num_random_blocks == 0 or len(geometry.heads) == 1

    def layer_of_plan(self, layer_idx: int) -> int:
        return layer_idx if self.num_random_blocks else 0

    def length_dependent(self, causal: bool) -> bool:
        return not causal and (
            self.num_random_blocks > 0 or (self.global_blocks == "ends" and self.num_global_blocks > 0)
        )

    def block_plan(self, geometry: Geometry, device: torch.device, candidates: Tensor | None = None) -> list[Part]:
        # Tiles no larger than a block lie in one pair of blocks, so each is kept whole.
        tile = min(geometry.block, max(self.block_size, MIN_TILE))
        geometry = replace(geometry, block=tile)
        shared = self.same_for_all_heads(geometry)
        heads = torch.tensor(geometry.heads[:1] if shared else geometry.heads)
        tiles = self.candidates(geometry)
        nested = self.block_size % tile == 0 and geometry.query_offset % tile == 0
        diagonal = on_lists(band_tiles(geometry, Band(0, 0)), len(heads)) if self.drop_diagonal else None

        def predicate(index: Tensor, i: Tensor, j: Tensor) -> Tensor:
            kept = self.allowed(heads.to(index.device)[index], i, j, geometry)
            return kept & (i != j) if self.drop_diagonal else kept

        layout = build_layout(
            predicate,
            geometry.query_length,
            geometry.key_length,
            heads=len(heads),
            block=tile,
            band=geometry.full_band,
            candidates=diagonal if nested else tiles,
            full_tiles=tiles if nested else None,
            query_offset=geometry.query_offset,
            device=device,
        )
        return [BlockPart(layout)]

    def candidates(self, geometry: Geometry) -> Tensor:
        count = self._num_blocks(geometry)
        rows = torch.arange(geometry.query_offset // self.block_size, count)
        leading, trailing = self._global_counts(geometry)
        half, last = self.num_window_blocks // 2, torch.full_like(rows, count)
        everything = (rows < leading) | (rows >= count - trailing)
        shared = [
            self._tiles(geometry, 0, rows, rows - half, rows + half + 1),
            self._tiles(geometry, 0, rows, torch.zeros_like(rows), torch.full_like(rows, leading)),
            self._tiles(geometry, 0, rows, last - trailing, last),
        ]
        if not geometry.causal:
            row = rows[everything]
            shared.append(self._tiles(geometry, 0, row, torch.zeros_like(row), torch.full_like(row, count)))
        if self.same_for_all_heads(geometry) and self.num_random_blocks == 0:
            return torch.cat(shared)
        table = self._random_blocks(geometry)[list(geometry.heads)][:, rows]
        index, row, column = torch.nonzero(table >= 0, as_tuple=True)
        drawn = table[index, row, column]
        return torch.cat(
            [
                on_lists(torch.cat(shared), len(geometry.heads)),
                self._tiles(geometry, index, rows[row], drawn, drawn + 1),
            ]
        )

    def row_keys(self, head: int, position: int, geometry: Geometry) -> Tensor:
        return positions_of(self.row_runs(head, position, geometry))

    def row_runs(self, head: int, position: int, geometry: Geometry) -> list[Run]:
        row, count, size = position // self.block_size, self._num_blocks(geometry), self.block_size
        leading, trailing = self._global_counts(geometry)
        if not geometry.causal and (row < leading or row >= count - trailing):
            return [(0, geometry.key_length, 1)]
        half = self.num_window_blocks // 2
        blocks = {
            *range(min(leading, count)),
            *range(max(0, row - half), min(count, row + half + 1)),
            *range(max(0, count - trailing), count),
            *(block for block in self._random_blocks(geometry)[head, row].tolist() if block >= 0),
        }
        return [(b * size, min((b + 1) * size, geometry.key_length), 1) for b in sorted(blocks)]

    def runs_serve(self, position: int) -> int:
        return (position // self.block_size + 1) * self.block_size - 1

    def keep(self, position: int, geometry: Geometry) -> Tensor:
        if self.num_random_blocks:  # a later row may draw any block of the past
            return geometry.readable(position)
        block = torch.arange(position) // self.block_size
        leading, _ = self._global_counts(geometry)
        near = block >= position // self.block_size - self.num_window_blocks // 2
        return (near | (block < leading)) & geometry.readable(position)

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _num_blocks(self, geometry: Geometry) -> int:
        return -(-geometry.key_length // self.block_size)

    def _global_counts(self, geometry: Geometry) -> tuple[int, int]:
        """Leading and trailing global blocks; causal rows may not depend on where the sequence ends."""
        if self.global_blocks == "first":
            return self.num_global_blocks, 0
        half = self.num_global_blocks // 2
        return half, 0 if geometry.causal else half

    def _near_or_global(self, q_block: Tensor, k_block: Tensor, geometry: Geometry) -> Tensor:
        count = self._num_blocks(geometry)
        leading, trailing = self._global_counts(geometry)
        kept = ((q_block - k_block).abs() <= self.num_window_blocks // 2) | (k_block < leading)
        if not geometry.causal:
            kept = kept | (k_block >= count - trailing) | (q_block < leading) | (q_block >= count - trailing)
        return kept

    def _tiles(self, geometry: Geometry, index: Tensor | int, row: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The tiles of query block ``row`` and key blocks ``low <= block < high``."""
        size = self.block_size
        return tiles_of(geometry, index, row * size, (row + 1) * size, low * size, high * size)

    def _random_blocks(self, geometry: Geometry) -> Tensor:
        count = self._num_blocks(geometry)
        if geometry.causal:  # rows do not depend on the length: one table serves all lengths up to a power of two
            count = 1 << (count - 1).bit_length()
        return random_blocks(self, geometry.layer_idx, max(geometry.heads) + 1, count, geometry.causal)


@lru_cache(maxsize=256)
def random_blocks(config: BigBirdAttentionConfig, layer_idx: int, num_heads: int, count: int, causal: bool) -> Tensor:
    """The random blocks of every row, int64 ``[num_heads, count, at most num_random_blocks]``; -1 where there is none.

    Draw ``t`` of a row is ``mix(mix(mix(mix(mix(seed) ^ layer) ^ head) ^ block) ^ t) mod C``, C the blocks there are
    (causal: up to the own); blocks attended anyway and repeats are passed over.
    """
    geometry = Geometry(count * config.block_size, count * config.block_size, causal=causal)
    row = torch.arange(count)
    eligible = row + 1 if causal else torch.full_like(row, count)
    eligible = eligible - _attended_count(config, geometry, row)
    wanted = eligible.clamp(min=0, max=config.num_random_blocks)
    table = torch.full((num_heads, count, int(wanted.max())), -1)
    if table.shape[2] == 0:
        return table
    for at in torch.nonzero((wanted > 0) & (wanted == eligible)).flatten().tolist():
        blocks = torch.arange(at + 1 if causal else count)
        table[:, at, : int(wanted[at])] = blocks[~config._near_or_global(torch.tensor(at), blocks, geometry)]
    open_rows = torch.nonzero(wanted < eligible).flatten()
    head, at = torch.cartesian_prod(torch.arange(num_heads), open_rows).unbind(1)
    start = splitmix64(splitmix64(config.seed) ^ layer_idx)
    state = torch.full_like(head, start - (1 << 64) if start >= 1 << 63 else start)
    state = splitmix64_tensor(splitmix64_tensor(state ^ head) ^ at)
    filled = torch.zeros_like(head)
    draw = 0
    while len(head):
        block = _unsigned_mod(splitmix64_tensor(state ^ draw), at + 1 if causal else torch.full_like(at, count))
        fresh = ~config._near_or_global(at, block, geometry) & (table[head, at] != block[:, None]).all(1)
        table[head[fresh], at[fresh], filled[fresh]] = block[fresh]
        filled = filled + fresh.long()
        going = filled < config.num_random_blocks
        head, at, state, filled = head[going], at[going], state[going], filled[going]
        draw += 1
    return table


def _attended_count(config: BigBirdAttentionConfig, geometry: Geometry, row: Tensor) -> Tensor:
    """How many blocks (causal: up to the own one) each row attends without random ones, int64 like ``row``."""
    count = len(row)
    leading, trailing = config._global_counts(geometry)
    last = row + 1 if geometry.causal else torch.full_like(row, count)
    low = (row - config.num_window_blocks // 2).clamp(min=0)
    high = torch.minimum(row + config.num_window_blocks // 2 + 1, last)
    before = torch.minimum(low, torch.tensor(leading)) + (torch.minimum(last, torch.tensor(leading)) - high).clamp(
        min=0
    )
    tail = torch.tensor(max(count - trailing, min(leading, count)))
    after = (torch.minimum(low, last) - tail).clamp(min=0) + (last - torch.maximum(high, tail)).clamp(min=0)
    if geometry.causal:
        return high - low + before
    everything = (row < leading) | (row >= count - trailing)
    return torch.where(everything, count, high - low + before + after)


def _unsigned_mod(x: Tensor, modulus: Tensor) -> Tensor:
    """``x mod modulus`` with the 64 bits of ``x`` read as unsigned; ``modulus < 2**31``."""
    half = (x >> 1) & (2**63 - 1)
    return ((half % modulus) * 2 + (x & 1)) % modulus
