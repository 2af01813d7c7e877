"""The parts that run a frozen learned mask: offsets or block lists for a structured one, block lists for a table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sa_hf.layer import DEFAULT_BLOCK, AttentionInputs
from sa_hf.ops.counts import row_counts
from sa_hf.ops.cpp.steps import Listed, decode_step
from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import Band, BlockPart, OffsetsPart, Part, ScoreOptions, SegmentPart
from sa_hf.ops.planned import PlanData, plan_rule
from sa_hf.ops.reads import NOTHING, Reads, RunLists, runs_of
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import own_key_parts
from sa_hf.patterns.steps import run_step, shared_reads

# One offset costs about as much as 10 keys of a tile: LogSparse's 15 offsets beside a causal window of 512, 16,384
# tokens on the CPU (model_cards/results/benchmark_cpu.md).
TILE_KEYS_PER_OFFSET = 10


FROZEN_MASK = "frozen_mask"
# Plans of the frozen masks that live, by (shape of the call, band, version of the table).
PLANS_KEPT = 64
_PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_LISTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # what their steps of decoding read


@plan_rule(FROZEN_MASK)
def _frozen_parts(data: PlanData) -> tuple[Part, ...]:
    """Tensors: the table of :func:`frozen_plan`. Numbers: the band, whether the diagonal is left out."""
    (kept,) = data.tensors
    left, right, drop_diagonal = data.numbers
    plans: dict[object, tuple[Part, ...]] = _PLANS.setdefault(kept, {})
    version = _version(kept)
    key = data.query_length, data.key_length, left, right, drop_diagonal, version
    known = plans.get(key)
    if known is None:
        while len(plans) >= PLANS_KEPT:
            plans.pop(next(iter(plans)), None)
        known = plans[key] = tuple(
            frozen_plan(kept, data.query_length, data.key_length, Band(left, right), bool(drop_diagonal))
        )
    return known


def _version(kept: Tensor) -> int | None:
    return None if kept.is_inference() else kept._version


def mask_step(inputs: AttentionInputs, kept: Tensor, band: Band, options: ScoreOptions, drop_diagonal: bool) -> Tensor:
    """A step of decoding (``steps.is_step_in_place``) by a fixed mask ``kept`` as in :func:`frozen_plan`; one by pair
    takes whole rows alone."""
    if kept.dim() == 2:
        return run_step(inputs, distance_reads(inputs.sequences, kept, band, drop_diagonal), options)
    query, key, value = inputs.query, inputs.key, inputs.value
    n_q, n_k = query.shape[2], inputs.sequences.key_length
    position = torch.arange(n_k)
    rows = kept[:, n_k - n_q : n_k, :n_k]
    if drop_diagonal:
        rows = rows & (position[n_k - n_q :, None] != position)
    listed = Listed(torch.where(rows, position, -1)[None])
    reads = shared_reads(inputs.sequences, band.left, NOTHING, own_if_empty=True)
    return decode_step(query, key, value, reads, options, kept=inputs.key_slots, listed=listed)


def distance_reads(sequences: Sequences, kept: Tensor, band: Band, drop_diagonal: bool) -> Reads:
    """What the new queries read by a mask of distances."""
    lists = _distances(kept, drop_diagonal)
    return shared_reads(sequences, band.left, lists, relative=True, own_if_empty=True)


def _distances(kept: Tensor, drop_diagonal: bool) -> RunLists:
    """The kept distances of each head as runs, one list where the heads are alike."""
    lists: dict[object, RunLists] = _LISTS.setdefault(kept, {})
    key = _version(kept), drop_diagonal
    known = lists.get(key)
    if known is None:
        rows = [torch.nonzero(head).flatten() for head in kept]
        rows = [row[row > 0] if drop_diagonal else row for row in rows]
        alike = all(torch.equal(row, rows[0]) for row in rows)
        lists.clear()
        known = lists[key] = RunLists.of([runs_of(row) for row in (rows[:1] if alike else rows)])
    return known


def frozen_plan(kept: Tensor, query_length: int, key_length: int, band: Band, drop_diagonal: bool) -> list[Part]:
    """The plan of a fixed mask over one sequence.

    Args:
        kept: bool ``[H, mask_length]`` by distance, or ``[H, mask_length, mask_length]`` by pair.
        band: the model's window and causality.
    """
    if kept.dim() == 3:
        return [_table_part(kept, query_length, key_length, band, drop_diagonal)]
    offsets = _offsets(kept, key_length, band, drop_diagonal)
    if query_length == 1:
        return [_one_row(offsets, key_length, kept.device)]
    parts = _structured_parts(kept, offsets, query_length, key_length, band, drop_diagonal)
    counts = row_counts(parts, query_length, len(kept), kept.device)
    return [*parts, *own_key_parts((counts == 0).long(), key_length - query_length)]


def _offsets(kept: Tensor, key_length: int, band: Band, drop_diagonal: bool) -> list[tuple[int, ...]]:
    """Per head the kept ``i - j``, ascending, that the band allows in a sequence of this length."""
    behind = key_length - 1 if band.left is None else min(band.left, key_length - 1)
    ahead = key_length - 1 if band.right is None else min(band.right, key_length - 1)
    rows = []
    for head in kept.cpu():
        distances = torch.nonzero(head).flatten().tolist()
        if drop_diagonal:
            distances = [d for d in distances if d > 0]
        negative = [-d for d in reversed(distances) if 0 < d <= ahead]
        rows.append((*negative, *(d for d in distances if d <= behind)))
    return rows


def _structured_parts(
    kept: Tensor, offsets: list[tuple[int, ...]], query_length: int, key_length: int, band: Band, drop_diagonal: bool
) -> list[Part]:  # fmt: skip
    block = DEFAULT_BLOCK
    longest = max(len(row) for row in offsets)
    # Distances that share a tile: offset d of a row block touches the key blocks at -d // block and the one before.
    tiles = max(len({t for d in row for t in (-d // block, (-d + block - 1) // block)}) for row in offsets)
    if query_length == key_length and longest * TILE_KEYS_PER_OFFSET <= tiles * block:
        shared = len(set(offsets)) == 1
        return [OffsetsPart(key_length, tuple(offsets[:1] if shared else offsets))] if longest else []

    def predicate(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (i - j).abs()
        inside = (distance < kept.shape[1]) & ((distance > 0) | (not drop_diagonal))
        return kept[head, distance.clamp(max=kept.shape[1] - 1)] & inside

    reach = band.intersect(Band(kept.shape[1] - 1, kept.shape[1] - 1))
    layout = build_layout(
        predicate, query_length, key_length, heads=len(kept), block=block, band=reach,
        query_offset=key_length - query_length, device=kept.device,
    )  # fmt: skip
    return [BlockPart(layout)]


def _one_row(offsets: list[tuple[int, ...]], key_length: int, device: torch.device) -> SegmentPart:
    """The last position's keys, gathered: what one step of decoding reads."""
    rows = [[key_length - 1 - d for d in row if 0 <= key_length - 1 - d < key_length] for row in offsets]
    rows = [row or [key_length - 1] for row in rows]
    width = max(len(row) for row in rows)
    index = torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=device)[None]
    return SegmentPart(1, width, 1, width, key_index=index)


def _table_part(kept: Tensor, query_length: int, key_length: int, band: Band, drop_diagonal: bool) -> BlockPart:
    offset = key_length - query_length
    i = torch.arange(offset, key_length, device=kept.device)[:, None]
    j = torch.arange(key_length, device=kept.device)[None, :]
    own = i == j
    rows = kept[:, offset:key_length, :key_length] & band.contains(i, j)
    if drop_diagonal:
        rows = rows & ~own
    rows = rows | (own & ~rows.any(-1, keepdim=True))
    # A row that is left alone keeps its own key even where the window leaves that out, so the lists hold no band.
    layout = build_layout(
        lambda head, query, key: rows[head, (query - offset).clamp(min=0), key.clamp(min=0)],
        query_length, key_length, heads=len(kept), query_offset=offset, device=kept.device,
    )  # fmt: skip
    return BlockPart(layout)
