"""Attention of a few new queries over listed positions of a long cache: cost and traffic follow the lists alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.choice import CANDIDATES, CPP, choose_decoder
from sa_hf.ops.parts import ScoreOptions


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions, engine: str = "auto"
) -> Tensor:
    """Each query attends the key positions that its list names.

    Args:
        query: ``[B, H, Nq, D]``, the last Nq positions of the sequences; few rows.
        key: ``[B, Hkv, Nk, D]``, H a multiple of Hkv; value: ``[B, Hkv, Nk, Dv]``.
        index: integer ``[B | 1, 1 | Hkv | H, Nq, m]``, positions in ``0 .. Nk - 1`` in any order; -1 is empty, a
            repeated position counts each time. Lists that the heads of a group share are read once for the group.
        options: scale, softcap, distance bias, spans and sinks; dropout must be 0.
        engine: as everywhere; torch's operators alone are differentiable, and take what the kernels cannot.

    Returns:
        ``[B, H, Nq, Dv]`` in the query's dtype; a query without a key is 0.

    Raises:
        SparseAttentionError: shapes that do not fit together, dropout, or an engine that cannot serve the input.
    """
    _check(query, key, value, index, options)
    return choose_decoder(engine, query, key, value, options).decode(query, key, value, index, options)


def runs_in_place(query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: str) -> bool:
    """Whether the C++ kernel takes a step, which reads a cache where it lies (``cpp.steps``)."""
    return CPP in CANDIDATES[engine] and CPP.cannot_decode(query, key, value, options) is None


def _check(query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> None:
    batch, heads, n_q, _ = query.shape
    kv_heads = key.shape[1]
    if key.shape[:3] != value.shape[:3] or heads % kv_heads or key.shape[0] != batch or key.shape[3] != query.shape[3]:
        raise SparseAttentionError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be "
            "[B, H, Nq, D], [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv] with H a multiple of Hkv"
        )
    fits = index.dim() == 4 and index.shape[0] in (1, batch) and index.shape[1] in (1, kv_heads, heads)
    if not fits or index.shape[2] != n_q or index.dtype not in (torch.int32, torch.int64):
        raise SparseAttentionError(
            f"index is {index.dtype} {tuple(index.shape)}; it must be an integer tensor [{batch} or 1, one of "
            f"{sorted({1, kv_heads, heads})}, {n_q}, m]"
        )
    if options.dropout > 0:
        raise SparseAttentionError(f"dropout={options.dropout} has no place in decoding; nearest: 0")
