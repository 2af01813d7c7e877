"""Launchers of the row kernels: a part's slots brought together; parts merged, and gradients summed, in positions.

Contract: tensors ``[B, H, N, D]`` of any strides; a position stands in one slot of a head at most; no host read (what
belongs to the indices of a kept plan is made once and waited for).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
import triton
from torch import Tensor

from sa_hf.ops.graphs import hold
from sa_hf.ops.parts import Index, Part
from sa_hf.ops.slots import made_of, take
from sa_hf.ops.triton.device import on_device
from sa_hf.ops.triton.launch import PREPARED, Prepared, aligned, build_options, chunks, packed, stats_empty, strides
from sa_hf.ops.triton.rows import MOST_PARTS, gather_kernel, invert_kernel, merge_parts_kernel, sum_parts_kernel

# Of rows per program and tensor: four 16-byte accesses by each of 128 threads where rows are copied, two where they are
# added up, in fp32 (with four, five parts leave sm_90 4 blocks per SM instead of 8, and head_dim 192 spills on sm_80).
COPIED_BYTES, SUMMED_BYTES = 8192, 4096
MOST_ROWS = 128
INVERTED_AT_ONCE = 1024


# By an index's id and a length: the index, so that the id stays its own, and the inverse.
Inverses: TypeAlias = dict[tuple[int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class SlotRows:
    """Rows ``[B, H, slots, D]`` of a part in the slots of an index, and their log-sum-exp ``[B, H, slots]`` where they
    are outputs."""

    vectors: Tensor
    index: Index
    lse: Tensor | None = None


def gather(part: Part, query: Tensor, key: Tensor, value: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """The arguments in the part's slots, by one launch; views on the side whose index is none or a slice.

    Args: rows: nothing, or output, its gradient ``[B, H, Nq, D]`` and log-sum-exp ``[B, H, Nq]`` of the queries.
    """
    q_at, k_at = _listed(part.query_index), _listed(part.key_index)
    queries, keys = (query, *rows), (key, value)
    to_queries = _room(queries, q_at, part.query_index)
    to_keys = _room(keys, k_at, part.key_index)
    if q_at is None and k_at is None:
        return to_queries[0], *to_keys, *to_queries[1:]
    q, out, grad, lse = _sources(queries, q_at)
    k, v, *_ = _sources(keys, k_at)
    batch, heads, length, d = query.shape
    key_heads, n_q, n_k = to_keys[0].shape[1], to_queries[0].shape[2], to_keys[0].shape[2]
    tile = tile_rows(query, COPIED_BYTES)
    query_tiles, key_tiles = (0 if at is None else triton.cdiv(at.shape[2], tile) for at in (q_at, k_at))
    start = _gather(
        (query_tiles + key_tiles, max(heads, key_heads), batch), tuple(_strides_of(x) for x in (q, out, grad, k, v)),
        (*_index_strides(q_at), *_index_strides(k_at)), (n_q, n_k, length, heads, key_heads),
        key_heads // key.shape[1], query_tiles, tile, d,
    )  # fmt: skip
    hold(query, part)
    with on_device(query.device):
        start(q, out, grad, lse, k, v, *_targets(to_queries, q_at), *_targets(to_keys, k_at)[:2], q_at, k_at)
    return to_queries[0], *to_keys, *to_queries[1:]


@lru_cache(maxsize=PREPARED)
def _gather(
    grid: tuple[int, ...], of: tuple[tuple[int, ...], ...], places: tuple[int, ...], sizes: tuple[int, ...],
    group: int, query_tiles: int, tile: int, head_dim: int,
) -> Prepared:  # fmt: skip
    arguments = {
        name: x for key, strides_of in zip("qogkv", of, strict=True) for name, x in strides(key, strides_of).items()
    }
    arguments |= dict(zip(("pqb", "pqh", "pkb", "pkh"), places, strict=True))
    arguments |= dict(zip(("n_q", "n_k", "length", "heads", "key_heads"), sizes, strict=True))
    arguments |= {"group": group, "query_tiles": query_tiles, "ROWS": tile, **chunks(head_dim)}
    return Prepared(gather_kernel, grid, arguments)


def merge(parts: Sequence[SlotRows], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs of up to ``MOST_PARTS`` parts as one softmax over all their keys, in the shape of ``like [B, H, N, D]``,
    and its log-sum-exp ``[B, H, N]`` in fp32; positions in no slot get 0 and -inf."""
    batch, heads, length, d = like.shape
    out = torch.empty(like.shape, dtype=dtype, device=like.device)
    lse = stats_empty(like, batch, heads, length)
    tile = tile_rows(like, SUMMED_BYTES)
    with on_device(like.device):
        inverses, sizes = _places(parts, length, {})
        merge_parts_kernel[triton.cdiv(length, tile), heads, batch](
            tuple(packed(part.vectors) for part in parts), tuple(packed(_lse(part)) for part in parts), inverses,
            out, lse, **sizes, length=length, heads=heads, PARTS=len(parts), ROWS=tile, **chunks(d), **build_options(),
        )  # fmt: skip
    return out, lse


def sum_rows(parts: Sequence[SlotRows], like: Tensor, dtype: torch.dtype, known: Inverses | None = None) -> Tensor:
    """Gradients of up to ``MOST_PARTS`` parts, added up in fp32, in the shape of ``like [B, H, N, D]``; a part whose
    index is by head may have a multiple of H heads, whose groups are added up.

    Args: known: what one call made of its indices, for the next.
    """
    batch, heads, length, d = like.shape
    out = torch.empty(like.shape, dtype=dtype, device=like.device)
    tile = tile_rows(like, SUMMED_BYTES)
    group = max(part.vectors.shape[1] for part in parts) // heads
    with on_device(like.device):
        inverses, sizes = _places(parts, length, {} if known is None else known)
        sum_parts_kernel[triton.cdiv(length, tile), heads, batch](
            tuple(packed(part.vectors) for part in parts), inverses, out, **sizes, length=length, heads=heads,
            group=group, PARTS=len(parts), ROWS=tile, **chunks(d), **build_options(),
        )  # fmt: skip
    return out


def _lse(part: SlotRows) -> Tensor:
    if part.lse is None:
        raise TypeError("outputs are merged by their log-sum-exp")
    return part.lse


def _places(
    parts: Sequence[SlotRows], length: int, known: Inverses
) -> tuple[tuple[Tensor, ...] | None, dict[str, int]]:
    """Where each position stands in the parts: an inverse index of each (None where no part has an index; where only
    some have, any stands in), and the kernels' numbers."""
    inverses: list[Tensor | None] = []
    starts = []
    for part in parts:
        if isinstance(part.index, Tensor):
            place = id(part.index), length
            if place not in known:
                known[place] = part.index, inverse(part.index, length)
            inverses.append(known[place][1])
            starts.append(-1 - (2 * (part.index.shape[0] > 1) + (part.index.shape[1] > 1)))
        else:
            inverses.append(None)
            starts.append(0 if part.index is None else part.index.start)
    some = next((x for x in inverses if x is not None), None)
    unused = [0] * (MOST_PARTS - len(parts))
    slots = [part.vectors.shape[2] for part in parts]
    sizes = {f"n{at}": x for at, x in enumerate([*slots, *unused])}
    sizes |= {f"s{at}": x for at, x in enumerate([*starts, *unused])}
    return (None if some is None else tuple(some if x is None else x for x in inverses)), sizes


def inverse(index: Tensor, length: int) -> Tensor:
    """The slot of each position below ``length`` in an index ``[B | 1, H | 1, slots]``, int32, -1 where it is in none;
    kept with the index of a kept plan."""

    def make() -> Tensor:
        batch, heads, slots = index.shape
        result = torch.full((batch, heads, length), -1, dtype=torch.int32, device=index.device)
        with on_device(index.device):
            invert_kernel[triton.cdiv(slots, INVERTED_AT_ONCE), heads, batch](
                packed(index), result, slots=slots, length=length, ROWS=INVERTED_AT_ONCE, **build_options()
            )  # fmt: skip
        return result

    hold(index, index)
    return made_of(index, f"inverse {length}", make)


def tile_rows(x: Tensor, size: int) -> int:
    """Rows of ``size`` bytes per program: a power of two."""
    return min(MOST_ROWS, size // (chunks(x.shape[-1])["D0"] * x.element_size()))


def _listed(index: Index) -> Tensor | None:
    return packed(index) if isinstance(index, Tensor) else None


def _index_strides(index: Tensor | None) -> tuple[int, int]:
    """Of the batch and of the head, 0 where shared."""
    if index is None:
        return 0, 0
    batch, heads, slots = index.shape
    return (heads * slots if batch > 1 else 0), (slots if heads > 1 else 0)


def _room(tensors: Sequence[Tensor], at: Tensor | None, index: Index) -> list[Tensor]:
    """Where the slots of tensors go; where nothing is listed, views that hold them already."""
    if at is None:
        return [take(x, index) for x in tensors]
    shapes = [(x.shape[0], max(x.shape[1], at.shape[1]), at.shape[2], *x.shape[3:]) for x in tensors]
    return [torch.empty(shape, dtype=x.dtype, device=x.device) for x, shape in zip(tensors, shapes, strict=True)]


def _sources(tensors: Sequence[Tensor], at: Tensor | None) -> list[Tensor | None]:
    """Four, None where there is none."""
    ready = [] if at is None else [aligned(x) if x.dim() == 4 else packed(x) for x in tensors]
    return [*ready, *[None] * (4 - len(ready))]


def _targets(tensors: Sequence[Tensor], at: Tensor | None) -> list[Tensor | None]:
    return [None] * 4 if at is None else [*tensors, *[None] * (4 - len(tensors))]


def _strides_of(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
