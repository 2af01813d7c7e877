"""Launchers of the row kernels: a part's slots brought together; parts merged, and gradients summed, in positions.

Contract: tensors ``[B, H, N, D]`` of any strides; a position stands in one slot of a head at most; no host read (what
belongs to the indices of a kept plan is made once and waited for).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
from sa_hf.ops.graphs import hold
from sa_hf.ops.parts import Index, Part
from sa_hf.ops.slots import take
from sa_hf.ops.triton.engine import on_device
from sa_hf.ops.triton.launch import aligned, build_options, chunks, packed, strides
from sa_hf.ops.triton.rows import gather_kernel

TILE_BYTES = 8192  # of rows per program and tensor: four 16-byte accesses by each of 128 threads
MOST_ROWS = 128


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
    tile = tile_rows(query)
    query_tiles, key_tiles = (0 if at is None else triton.cdiv(at.shape[2], tile) for at in (q_at, k_at))
    pqb, pqh = _index_strides(q_at)
    pkb, pkh = _index_strides(k_at)
    hold(query, part)
    with on_device(query.device):
        gather_kernel[query_tiles + key_tiles, max(heads, key_heads), batch](
            q, out, grad, lse, k, v, *_targets(to_queries, q_at), *_targets(to_keys, k_at)[:2], q_at, k_at,
            **_strides("q", q), **_strides("o", out), **_strides("g", grad), **_strides("k", k), **_strides("v", v),
            pqb=pqb, pqh=pqh, pkb=pkb, pkh=pkh, n_q=n_q, n_k=n_k, length=length, heads=heads, key_heads=key_heads,
            group=key_heads // key.shape[1], query_tiles=query_tiles, ROWS=tile, **chunks(d), **build_options(),
        )  # fmt: skip
    return to_queries[0], *to_keys, *to_queries[1:]


def tile_rows(x: Tensor) -> int:
    """Rows per program: a power of two."""
    return min(MOST_ROWS, TILE_BYTES // (chunks(x.shape[-1])["D0"] * x.element_size()))


def _listed(index: Index) -> Tensor | None:
    return index.contiguous() if isinstance(index, Tensor) else None


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


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    return {f"s{name}{axis}": 0 for axis in "bhn"} if x is None else strides(name, x)
