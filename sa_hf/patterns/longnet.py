"""LongNet: dilated attention (Ding et al. 2023, arXiv 2307.02486).

Branch ``(w, r)`` cuts the sequence into segments of ``w`` positions and keeps, per head, every ``r``-th of them from
the head's offset ``s`` on: query ``i`` is active where ``(i mod w) mod r == s`` and attends the active keys of its
segment. The branches are mixed by their softmax denominators, which is one softmax over the multiset union of their
keys: a key in two branches counts twice, and the mixing weights carry gradients.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_hf.config import MAX_INTEGER, check_choice, register_pattern, shown
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import Geometry
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.layout import Predicate
from sa_hf.ops.parts import Band, Part, SegmentPart
from sa_hf.ops.reads import Run, positions_of
from sa_hf.patterns.base import StaticPatternConfig

# Each branch is a part of the plan: 31 double from 1 to the longest segment there can be.
MAX_BRANCHES = 64


@register_pattern
@dataclass(frozen=True, kw_only=True)
class LongNetAttentionConfig(StaticPatternConfig):
    """LongNet.

    Args:
        segment_length: w of each branch, increasing.
        dilated_ratio: r of each branch, increasing, as many.
        head_offset: offset of head h in a branch: "modulo", ``h mod r`` (the paper), or "grouped",
            ``h // ceil(num_heads / r)`` (the public reference code).

    Warns where no branch has ``r = 1`` (some rows then read nothing), and for inputs longer than the largest w
    (nothing passes between its segments).
    """

    name: ClassVar[str] = "longnet"

    segment_length: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    dilated_ratio: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    head_offset: str = "modulo"

    def validate(self) -> None:
        for field in ("segment_length", "dilated_ratio"):
            object.__setattr__(self, field, _increasing(field, getattr(self, field)))
        lengths = self.segment_length, self.dilated_ratio
        if len(self.segment_length) != len(self.dilated_ratio):
            raise SparseAttentionError(
                f"longnet.segment_length={list(self.segment_length)} and dilated_ratio={list(self.dilated_ratio)} must "
                f"have one entry per branch each; nearest: the first {min(map(len, lengths))} of both"
            )
        check_choice(self, "head_offset", ("modulo", "grouped"))
        if self.dilated_ratio[0] != 1:
            warnings.warn(
                f"longnet.dilated_ratio={list(self.dilated_ratio)} has no branch with ratio 1: positions that no "
                "branch keeps attend nothing and give 0",
                stacklevel=2,
            )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {"paper": {"segment_length": (2048, 4096, 8192, 16384, 32768), "dilated_ratio": (1, 2, 4, 6, 12)}}

    # -- the predicate ---------------------------------------------------------------------------------------------

    def offset(self, head: Tensor, ratio: int, num_heads: int) -> Tensor:
        """``s_h`` of the heads in a branch of this ratio."""
        return head % ratio if self.head_offset == "modulo" else head // -(-num_heads // ratio)

    def offset_of(self, head: int, ratio: int, num_heads: int) -> int:
        """``s_h`` of one head."""
        return head % ratio if self.head_offset == "modulo" else head // -(-num_heads // ratio)

    def branches(self, geometry: Geometry) -> list[Predicate]:
        pairs = zip(self.segment_length, self.dilated_ratio, strict=True)
        return [partial(self._branch, w, r, geometry.num_heads) for w, r in pairs]

    def named_parts(self, geometry: Geometry) -> dict[str, Predicate]:
        return {f"r = {r}": b for r, b in zip(self.dilated_ratio, self.branches(geometry), strict=True)}

    def _branch(self, w: int, r: int, num_heads: int, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = self.offset(head, r, num_heads)
        return (i // w == j // w) & (i % w % r == s) & (j % w % r == s)

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        kept = torch.zeros_like(head + i + j, dtype=torch.bool)
        for branch in self.branches(geometry):
            kept = kept | branch(head, i, j)
        return kept

    def same_for_all_heads(self, geometry: Geometry) -> bool:
        return all(len(self._offsets(r, geometry)) == 1 for r in self.dilated_ratio)

    def _offsets(self, ratio: int, geometry: Geometry) -> list[int]:
        """The offset of each head of the geometry, one where they agree."""
        offsets: list[int] = self.offset(torch.tensor(geometry.heads), ratio, geometry.num_heads).tolist()
        return offsets[:1] if len(set(offsets)) == 1 else offsets

    # -- the plan --------------------------------------------------------------------------------------------------

    def block_plan(self, geometry: Geometry, device: torch.device, candidates: Tensor | None = None) -> list[Part]:
        self._warn_if_longer(geometry)
        parts = []
        for w, r in zip(self.segment_length, self.dilated_ratio, strict=True):
            # Queries that are the end of a sequence begin inside a segment: the rest of it is a part of its own.
            whole = -(-geometry.query_offset // w) * w
            if geometry.query_offset < whole:
                parts.append(
                    self._segments(w, r, geometry, geometry.query_offset, min(whole, geometry.key_length), device)
                )
            if whole < geometry.key_length:
                parts.append(self._segments(w, r, geometry, whole, geometry.key_length, device))
        return [part for part in parts if part is not None]

    def _segments(
        self, w: int, r: int, geometry: Geometry, first: int, last: int, device: torch.device
    ) -> SegmentPart | None:
        """One branch for the queries ``first <= i < last``, which start a segment or lie in one: the kept positions of
        each segment in a run of slots, per head, -1 where a head has fewer."""
        begin = first // w * w
        w = min(w, last - begin)
        # A part drops the pairs of equal slots, so that needs queries and keys in step.
        skipped = 0 if self.drop_diagonal else (first - begin) // r
        offsets = self._offsets(r, geometry)
        # Slots of a segment are r positions apart from one offset: a band in positions is one in slots.
        band = geometry.full_band
        left = None if band.left is None else band.left // r - skipped
        right = None if band.right is None else band.right // r + skipped
        if r == 1 and geometry.query_offset == 0:
            return SegmentPart(last, last, w, w, band=Band(left, right), skip_diagonal=self.drop_diagonal)
        start = torch.arange(begin, last, w, device=device)[:, None, None]
        inside = torch.arange(0, w, r, device=device) + torch.tensor(offsets, device=device)[:, None]
        position = start + inside
        keys = torch.where((inside < w) & (position < last), position, -1).movedim(1, 0)
        queries = keys[..., skipped:]
        queries = torch.where(queries >= first, queries - geometry.query_offset, -1)
        query_segment, key_segment = queries.shape[2], keys.shape[2]
        query_index, key_index = _without_empty_end(queries), _without_empty_end(keys)
        query_slots, key_slots = query_index.shape[2], key_index.shape[2]
        if query_slots == 0:
            return None
        return SegmentPart(
            query_slots, key_slots, query_segment, key_segment, Band(left, right), self.drop_diagonal,
            query_index=query_index, key_index=key_index,
        )  # fmt: skip

    def _warn_if_longer(self, geometry: Geometry) -> None:
        if geometry.key_length > self.segment_length[-1]:
            warnings.warn(
                f"longnet: an input of {geometry.key_length} tokens is longer than the largest segment, "
                f"{self.segment_length[-1]}: nothing passes between its segments; add a branch that covers the input",
                stacklevel=2,
            )

    # -- decoding --------------------------------------------------------------------------------------------------

    def row_keys(self, head: int, position: int, geometry: Geometry) -> Tensor:
        return positions_of(self.row_runs(head, position, geometry))

    def row_runs(self, head: int, position: int, geometry: Geometry) -> list[Run]:
        runs = []
        for w, r in zip(self.segment_length, self.dilated_ratio, strict=True):
            s = self.offset_of(head, r, geometry.num_heads)
            begin = position // w * w
            end = min(begin + w, position + 1 if geometry.causal else geometry.key_length)
            if position % w % r == s:
                runs.append((begin + s, end, r))
        return runs

    @with_host_defaults
    def row_sizes(self, geometry: Geometry) -> Tensor:
        """The union of the branches, counted per run of rows that share their segments and active branches."""
        sizes = torch.zeros(len(geometry.heads), geometry.key_length, dtype=torch.int64)
        known: dict[tuple[int, ...], Tensor] = {}
        for index, head in enumerate(geometry.heads):
            offsets = tuple(int(self.offset(torch.tensor(head), r, geometry.num_heads)) for r in self.dilated_ratio)
            if offsets not in known:
                known[offsets] = self._union_sizes(offsets, geometry)
            sizes[index] = known[offsets]
        if self.drop_diagonal:
            sizes = torch.where(sizes > 1, sizes - 1, sizes)
        return sizes[:, geometry.query_offset :]

    def _union_sizes(self, offsets: tuple[int, ...], geometry: Geometry) -> Tensor:
        """Distinct keys per row of a head with these offsets, int64 ``[key_length]``."""
        n, band = geometry.key_length, geometry.full_band
        branches = list(zip(self.segment_length, self.dilated_ratio, offsets, strict=True))
        cuts = sorted({*(at for w, _, _ in branches for at in range(0, n, w)), n})
        sizes = torch.zeros(n, dtype=torch.int64)
        for start, stop in pairwise(cuts):
            rows = torch.arange(start, stop)
            active = torch.stack([rows % w % r == s for w, r, s in branches], dim=1)
            kinds, kind = torch.unique(active, dim=0, return_inverse=True)
            for number, chosen in enumerate(kinds.tolist()):
                running = [branch for branch, on in zip(branches, chosen, strict=True) if on]
                if not running:
                    continue
                begin = min(start // w * w for w, _, _ in running)
                end = max(min(n, start // w * w + w) for w, _, _ in running)
                kept = torch.zeros(end - begin, dtype=torch.int64)
                for w, r, s in running:
                    kept[start // w * w + s - begin : start // w * w + w - begin : r] = 1
                before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
                own = rows[kind == number]
                low = own - n if band.left is None else own - band.left
                high = own + n if band.right is None else own + band.right + 1
                low, high = ((x - begin).clamp(0, end - begin) for x in (low, high))
                sizes[own] = before[high] - before[low]
        return sizes

    def keep(self, position: int, geometry: Geometry) -> Tensor:
        kept = torch.zeros(position, dtype=torch.bool)
        for w, r in zip(self.segment_length, self.dilated_ratio, strict=True):
            begin = position // w * w
            for s in set(self._offsets(r, geometry)):
                # The branch's keys go at the end of its segment, and when no active query is left in it.
                if position + (s - position % w) % r < begin + w:
                    kept[begin + s :: r] = True
        return kept & geometry.readable(position)


def _without_empty_end(slots: Tensor) -> Tensor:
    """``[H, segments, slots]`` as ``[1, H, slots]``, cut behind the last slot that some head fills."""
    flat = slots.flatten(1)
    filled = torch.nonzero((flat >= 0).any(0))
    return flat[None, :, : int(filled[-1]) + 1 if len(filled) else 0].contiguous()


def _increasing(field: str, value: Any) -> tuple[int, ...]:
    """The field as a tuple of increasing positive integers."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    rule = f"longnet.{field}={shown(value)} must be increasing integers in [1, {MAX_INTEGER}], one per branch"
    if len(values) > MAX_BRANCHES:
        raise SparseAttentionError(
            f"longnet.{field} has {len(values)} entries; at most {MAX_BRANCHES} branches: nearest: the first "
            f"{MAX_BRANCHES}"
        )
    if not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise SparseAttentionError(f"{rule}; for example (512, 1024), on a command line 512,1024")
    nearest = tuple(sorted({min(max(v, 1), MAX_INTEGER) for v in values}))
    if nearest != values:
        raise SparseAttentionError(f"{rule}; nearest: {nearest}")
    return values
