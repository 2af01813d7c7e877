"""Sparse Transformer: strided and fixed factorised attention (Child et al. 2019, arXiv 1904.10509).

With stride l and summary c, each pattern has a local part and a column part:

- strided: ``|i - j| < l`` (causal: ``0 <= i - j < l``), and ``|i - j| mod l == 0``;
- fixed: ``i // l == j // l``, and the summary columns ``l - (g + 1) c <= j mod l < l - g c`` of group g.

Heads attend the union ("merged"), layers alternate between the parts ("interleaved"), or heads do ("per_head").
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_hf.config import check_choice, check_integer, register_pattern
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import Geometry, LayerSpec
from sa_hf.ops.layout import Predicate, build_layout, on_heads
from sa_hf.ops.parts import Band, BlockLayout, BlockPart, OffsetsPart, Part, SegmentPart
from sa_hf.ops.reads import Run, positions_of
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.sliding_window import window_part
from sa_hf.patterns.tiles import band_tiles, on_lists, query_tiles, tiles_of

LOCAL, COLUMN = 0, 1


@register_pattern
@dataclass(frozen=True, kw_only=True)
class SparseTransformerAttentionConfig(StaticPatternConfig):
    """Sparse Transformer.

    Args:
        kind: "fixed" (text) or "strided" (images, periodic data).
        stride: l, about the square root of the length.
        summary: c, summary columns of a block (fixed); ``num_summary_groups * summary <= stride``.
        num_summary_groups: heads take turns with this many groups of columns, counted from the block's end (fixed).
        head_mode: "merged", "interleaved" (layer ``L`` runs part ``L mod 2``, local first) or "per_head" (head ``h``
            runs part ``h mod 2``). A fixed column part that stands alone also holds the query's own position.
    """

    name: ClassVar[str] = "sparse_transformer"

    kind: str = "fixed"
    stride: int = 128
    summary: int = 32
    num_summary_groups: int = 1
    head_mode: str = "merged"

    def validate(self) -> None:
        check_choice(self, "kind", ("fixed", "strided"))
        check_choice(self, "head_mode", ("merged", "interleaved", "per_head"))
        for field in ("stride", "summary", "num_summary_groups"):
            check_integer(self, field, minimum=1)
        if self.kind == "fixed" and self.num_summary_groups * self.summary > self.stride:
            raise SparseAttentionError(
                f"sparse_transformer.summary={self.summary} times num_summary_groups={self.num_summary_groups} must "
                f"not pass stride={self.stride}; nearest: stride={self.num_summary_groups * self.summary}, or "
                f"summary={max(1, self.stride // self.num_summary_groups)} with num_summary_groups="
                f"{min(self.num_summary_groups, self.stride)}"
            )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {
            "enwik8": {"kind": "fixed", "head_mode": "merged", "stride": 128, "summary": 32},
            "images": {"kind": "strided", "stride": 128},
        }

    def check_layers(self, specs: Sequence[LayerSpec]) -> None:
        super().check_layers(specs)
        parities = {spec.layer_idx % 2 for spec in specs}
        if self.head_mode == "interleaved" and len(parities) == 1:
            warnings.warn(
                f"sparse_transformer.head_mode='interleaved' on layers {[s.layer_idx for s in specs]} of one parity: "
                f"each runs the {'column' if parities == {1} else 'local'} part alone; nearest: head_mode='merged', or "
                "layers of both parities",
                stacklevel=2,
            )

    # -- the predicate ---------------------------------------------------------------------------------------------

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        stride = self.stride
        if self.kind == "strided":
            local, column = (i - j).abs() < stride, (i - j) % stride == 0
        else:
            local, column = i // stride == j // stride, self._summary(j, self._group(head))
            if self.head_mode != "merged":
                column = column | (i == j)
        if self.head_mode == "merged":
            return local | column
        part = head % 2 if self.head_mode == "per_head" else torch.full_like(head, geometry.layer_idx % 2)
        return torch.where(part == LOCAL, local, column)

    def named_parts(self, geometry: Geometry) -> dict[str, Predicate]:
        stride = self.stride
        if self.kind == "strided":
            return {"local": lambda head, i, j: (i - j).abs() < stride, "columns": lambda head, i, j: i == i}
        return {"local": lambda head, i, j: i // stride == j // stride, "summary columns": lambda head, i, j: i == i}

    def layer_of_plan(self, layer_idx: int) -> int:
        return layer_idx % 2 if self.head_mode == "interleaved" else 0

    def same_for_all_heads(self, geometry: Geometry) -> bool:
        running = {(tuple(parts), COLUMN in parts and self._group(h)) for h, parts in self._by_head(geometry)}
        return len(running) == 1

    def _by_head(self, geometry: Geometry) -> list[tuple[int, list[int]]]:
        return [(head, self._parts(head, geometry)) for head in geometry.heads]

    def _parts(self, head: int, geometry: Geometry) -> list[int]:
        """The parts that a head runs."""
        if self.head_mode == "merged":
            return [LOCAL, COLUMN]
        return [head % 2 if self.head_mode == "per_head" else geometry.layer_idx % 2]

    def _group(self, head: Any) -> Any:
        """The summary group of a head (int or tensor)."""
        if self.kind == "strided":
            return head * 0
        return (head // 2 if self.head_mode == "per_head" else head) % self.num_summary_groups

    def _summary(self, j: Tensor, group: Any) -> Tensor:
        end = self.stride - group * self.summary
        inside = j % self.stride
        kept: Tensor = (inside >= end - self.summary) & (inside < end)
        return kept

    # -- the plan --------------------------------------------------------------------------------------------------

    def plan(self, geometry: Geometry, device: torch.device) -> list[Part]:
        by_head = self._by_head(geometry)
        local = [index for index, (_, parts) in enumerate(by_head) if LOCAL in parts]
        column = [index for index, (_, parts) in enumerate(by_head) if COLUMN in parts]
        plan: list[Part] = []
        if local:
            plan += self._local(geometry, local, device)
        if column:
            make = self._strided_columns if self.kind == "strided" else self._fixed_columns
            plan += make(geometry, column, device)
        return plan

    def _local(self, geometry: Geometry, heads: list[int], device: torch.device) -> list[Part]:
        """The local part on some of the geometry's heads (by index)."""
        n, stride = geometry.key_length, self.stride
        everyone = len(heads) == len(geometry.heads)
        if self.kind == "strided":
            part = window_part(geometry, device, stride, drop_diagonal=self.drop_diagonal)
            if everyone:
                return [part]
            layout = part.layout if isinstance(part, BlockPart) else self._block_layout(geometry, n, device)
        elif everyone:
            segment = min(stride, n)
            return [SegmentPart(n, n, segment, segment, geometry.full_band, self.drop_diagonal)]
        else:
            layout = self._block_layout(geometry, stride, device)
        return [BlockPart(on_heads(layout, heads, len(geometry.heads)))]

    def _block_layout(self, geometry: Geometry, size: int, device: torch.device) -> BlockLayout:
        """One list: the pairs inside blocks of ``size`` positions."""
        n = geometry.key_length
        low = torch.arange(0, n, size)
        return build_layout(
            lambda _, i, j: (i // size == j // size) & ((i != j) | (not self.drop_diagonal)),
            n,
            n,
            heads=1,
            block=geometry.block,
            band=geometry.full_band,
            candidates=tiles_of(geometry, 0, low, low + size, low, low + size),
            device=device,
        )

    def _strided_columns(self, geometry: Geometry, heads: list[int], device: torch.device) -> list[Part]:
        """Positions in the order of their residue: a column is a run of slots, dense inside."""
        n, stride, band = geometry.key_length, self.stride, geometry.full_band
        rows, skip = -(-n // stride), self.drop_diagonal or self.head_mode == "merged"
        if rows == 1 and skip:
            return []
        position = torch.arange(min(stride, n), device=device)[:, None] + torch.arange(rows, device=device) * stride
        index = torch.where(position < n, position, -1).flatten()[None, None]
        slots = index.shape[2]
        band = Band(*(None if reach is None else reach // stride for reach in (band.left, band.right)))
        if len(heads) == len(geometry.heads):
            return [SegmentPart(slots, slots, rows, rows, band, skip, query_index=index, key_index=index)]
        filled = index[0, 0] >= 0
        low = torch.arange(0, slots, rows)
        in_slots = Geometry(slots, slots, block=geometry.block)
        layout = build_layout(
            lambda _, a, b: (a // rows == b // rows) & filled[b] & ((a != b) | (not skip)),
            slots,
            slots,
            heads=1,
            block=geometry.block,
            band=band,
            candidates=tiles_of(in_slots, 0, low, low + rows, low, low + rows),
            device=device,
        )
        layout = on_heads(layout, heads, len(geometry.heads))
        return [BlockPart(layout, query_index=index, key_index=index)]

    def _fixed_columns(self, geometry: Geometry, heads: list[int], device: torch.device) -> list[Part]:
        """All queries over the gathered summary columns; the own block (merged) or own position is left out."""
        n, stride, summary = geometry.key_length, self.stride, self.summary
        groups = torch.tensor([self._group(head) for head in geometry.heads], device=device)
        shared = len({int(groups[index]) for index in heads}) == 1
        groups = groups[heads[:1]] if shared else groups
        # Causal rows of the last block read no column of their own block (merged): it is left out.
        blocks = (n - 1) // stride if geometry.causal and self.head_mode == "merged" else -(-n // stride)
        begin = (stride - (groups[:, None, None] + 1) * summary) + torch.arange(blocks, device=device)[:, None] * stride
        position = (begin + torch.arange(min(summary, n), device=device)).flatten(1)
        position = torch.where(position < n, position, -1)
        position = position[:, : int((position >= 0).any(0).sum())]
        plan: list[Part] = []
        if position.shape[1]:
            # Whole blocks are read alike whatever group their columns belong to, unless a window cuts them.
            band = geometry.full_band
            alike = self.head_mode == "merged" and band.left is None and band.right in (None, 0) and n % stride == 0
            alike = alike or shared
            layout = self._column_layout(geometry, position[:1] if alike else position, [0] if alike else heads, device)
            if alike and len(heads) < len(geometry.heads):
                layout = on_heads(layout, heads, len(geometry.heads))
            plan.append(BlockPart(layout, key_index=position[None]))
        if self.head_mode != "merged" and not self.drop_diagonal:
            own = tuple((0,) if index in heads else () for index in range(len(geometry.heads)))
            plan.append(OffsetsPart(n, own[:1] if len(heads) == len(own) else own))
        return plan

    def _column_layout(
        self, geometry: Geometry, position: Tensor, lists: list[int], device: torch.device
    ) -> BlockLayout:
        """Query positions x gathered columns ``position [lists, slots]`` (-1: none), on the lists that are in use."""
        stride, summary, merged, band = self.stride, self.summary, self.head_mode == "merged", geometry.full_band

        def predicate(index: Tensor, i: Tensor, slot: Tensor) -> Tensor:
            j = position[index, slot]
            return (j >= 0) & band.contains(i, j) & (slot // summary != i // stride if merged else i != j)

        slots, block = position.shape[1], geometry.block
        q_low, q_high = (x[:, None] for x in query_tiles(geometry))
        q_last = q_high - 1
        first = torch.arange(0, slots, block)
        last = (first + block).clamp(max=slots) - 1
        host = position.cpu()
        k_low = host.where(host >= 0, geometry.key_length)[:, first].amin(0)
        k_last = host[:, last].where(host[:, last] >= 0, geometry.key_length - 1).amax(0)
        touched = torch.ones(len(q_low), len(first), dtype=torch.bool)
        whole = (host[:, last] >= 0).all(0).expand_as(touched)
        if band.left is not None:
            touched, whole = touched & (q_low - k_last <= band.left), whole & (q_last - k_low <= band.left)
        if band.right is not None:
            touched, whole = touched & (k_low - q_last <= band.right), whole & (k_last - q_low <= band.right)
        if merged:
            whole = whole & ((q_last // stride < first // summary) | (q_low // stride > last // summary))
        else:
            whole = whole & ((q_last < k_low) | (q_low > k_last))

        def tiles(which: Tensor) -> Tensor:
            found = torch.nonzero(touched & which)
            listed = on_lists(torch.cat([torch.zeros(len(found), 1, dtype=torch.int64), found], dim=1), len(lists))
            listed[:, 0] = torch.tensor(lists)[listed[:, 0]]
            return listed

        return build_layout(
            predicate,
            geometry.query_length,
            slots,
            heads=len(position),
            block=block,
            candidates=tiles(~whole),
            full_tiles=tiles(whole),
            device=device,
        )

    def candidates(self, geometry: Geometry) -> Tensor | None:
        if any(COLUMN in parts for _, parts in self._by_head(geometry)):
            return None
        return band_tiles(geometry, Band(self.stride - 1, self.stride - 1))

    # -- decoding --------------------------------------------------------------------------------------------------

    def row_keys(self, head: int, position: int, geometry: Geometry) -> Tensor:
        return positions_of(self.row_runs(head, position, geometry))

    def row_runs(self, head: int, position: int, geometry: Geometry) -> list[Run]:
        n = position + 1 if geometry.causal else geometry.key_length
        stride, parts = self.stride, self._parts(head, geometry)
        low = position // stride * stride if self.kind == "fixed" else max(0, position - stride + 1)
        high = min(n, low + stride if self.kind == "fixed" else position + stride)
        local = [(low, high, 1)] if LOCAL in parts else []
        if COLUMN not in parts:
            return local
        if not local:
            low = high = position  # a column part that stands alone holds the own position
        if self.kind == "strided":
            column = position % stride
            behind = high + (column - high) % stride
            own = [] if local else [(position, position + 1, 1)]
            return [(column, low, stride), *local, *own, (behind + stride * (not local), n, stride)]
        begin = stride - (self._group(head) + 1) * self.summary
        columns = [(at + begin, min(n, at + begin + self.summary), 1) for at in range(0, n, stride)]
        if local:  # whole blocks: the own one has its columns
            return [run for run in columns if not low <= run[0] < high] + local
        own = [] if any(a <= position < b for a, b, _ in columns) else [(position, position + 1, 1)]
        return columns + own

    def runs_serve(self, position: int) -> int:
        whole = self.kind == "fixed" and self.head_mode == "merged"
        return (position // self.stride + 1) * self.stride - 1 if whole else position

    def keep(self, position: int, geometry: Geometry) -> Tensor:
        j = torch.arange(position)
        kept = torch.zeros_like(j, dtype=torch.bool)
        for head, parts in self._by_head(geometry):
            if LOCAL in parts:
                low = position // self.stride * self.stride if self.kind == "fixed" else position - self.stride + 1
                kept |= j >= low
            if COLUMN in parts:
                kept |= self._summary(j, self._group(head)) if self.kind == "fixed" else True
        return kept & geometry.readable(position)
