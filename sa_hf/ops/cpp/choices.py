"""What a step of decoding chooses by content, in C++: torch's operators take longer to start than the choice takes."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from sa_hf.ops.cpp.call import CallRows, ChoiceCall, ClusterCall
from sa_hf.ops.cpp.kernels import library
from sa_hf.ops.cpp.rows import plain


def nearest_clusters(
    query: Tensor, key: Tensor, centroids: Tensor, turned: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The first of the centroids that are the nearest to the LayerNorm of each query and key: int64 ``[B, H, N]`` and
    ``[B, Hkv, N]``.

    Args:
        query: ``[B, H, N, D]``, key: ``[B, Hkv, N, D]``, of one dtype of ``ELEMENTS``; centroids: ``[Hkv, k, D]``.
        turned: ``(cos, sin)`` ``[B | 1, N, R]`` of the angles by which the halves of the first R dimensions were turned
            against each other, and are turned back first.
    """
    batch, heads, count, depth = query.shape
    query, key = plain(query, torch.float32), plain(key, torch.float32)
    centroids = centroids.detach().float().contiguous()
    of_queries, of_keys = (torch.empty((batch, x, count), dtype=torch.int64) for x in (heads, key.shape[1]))
    call = ClusterCall(
        query=CallRows.of(query), key=CallRows.of(key), centroids=centroids.data_ptr(),
        of_queries=of_queries.data_ptr(), of_keys=of_keys.data_ptr(), batch=batch, heads=heads,
        kv_heads=key.shape[1], rows=count, depth=depth, count=centroids.shape[1],
    )  # fmt: skip
    if turned is not None:
        cosine, sine = (x.detach().float().contiguous() for x in turned)
        call.cosine, call.sine, call.angle_batch, call.turned = (
            cosine.data_ptr(), sine.data_ptr(), cosine.shape[0], cosine.shape[2]
        )  # fmt: skip
    library().sa_hf_nearest(ctypes.byref(call))
    return of_queries, of_keys


def highest_blocks(query: Tensor, pooled: Tensor, reach: Sequence[int], together: int, most: int) -> Tensor:
    """The blocks of the ``most`` highest products of pooled keys with each query, summed in fp64 and rounded to fp32:
    ascending int64 ``[B, H / together, N, most]``, -1 behind them where fewer may be chosen. Of equal ones the lower.

    Args:
        query: ``[B, H, N, D]``, pooled: ``[B, Hkv, blocks, D]`` fp32.
        reach: of each row the first block that it may choose, and the one behind the last.
        together: query heads, of one key head, that choose by the sum of their scores.
    """
    batch, heads, count, depth = query.shape
    query, pooled = plain(query, torch.float32), plain(pooled, torch.float32)
    out = torch.empty((batch, heads // together, count, most), dtype=torch.int64)
    numbers = array("q", reach)
    call = ChoiceCall(
        query=CallRows.of(query), pooled=CallRows.of(pooled), reach=numbers.buffer_info()[0], out=out.data_ptr(),
        batch=batch, heads=heads, kv_heads=pooled.shape[1], rows=count, depth=depth, together=together, most=most,
    )  # fmt: skip
    library().sa_hf_choose(ctypes.byref(call))
    return out
