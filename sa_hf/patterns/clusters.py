"""Clusters as parts: which slots of a sorted order a row reads, and the members of balanced clusters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sa_hf.ops.data_layout import exact_lists, range_layout
from sa_hf.ops.members import sum_slots
from sa_hf.ops.parts import Band, BlockPart, OffsetsPart, Part, SegmentPart
from sa_hf.ops.planned import PlanData, plan_rule

CLUSTERS, MEMBERS, UNCOVERED = "clusters", "members", "uncovered"  # rules of plans

# -- causal --------------------------------------------------------------------------------------------------------


def causal_plan(query_cluster: Tensor, key_cluster: Tensor, window: int, left: int | None) -> list[Part]:
    """Row ``i`` reads itself and the last ``window - 1`` keys ``j < i`` of its query's cluster.

    Keys stand sorted by (cluster, position), so what a row reads is one run of slots; queries stand sorted likewise, so
    the rows of a tile read neighbouring runs and the tiles number O(n w).

    Args:
        query_cluster: int64 ``[G, H, nq]``; key_cluster: ``[G, Hkv, nk]``; the queries are the last nq positions.
        left: the model's own window, the largest ``i - j``; None is unbounded.
    """
    heads, n_q, n_k = query_cluster.shape[1], query_cluster.shape[2], key_cluster.shape[2]
    offset, group = n_k - n_q, heads // key_cluster.shape[1]
    own: Part = SegmentPart(n_q, n_q, 1, 1, key_index=slice(offset, n_k)) if offset else OffsetsPart(n_q, ((0,),))
    if window == 1:
        return [own]
    of_sorted, key_order = torch.sort(key_cluster, dim=-1, stable=True)
    code = (of_sorted * n_k + key_order).repeat_interleave(group, 1)  # ascending
    key_order = key_order.repeat_interleave(group, 1)
    of_rows, query_order = torch.sort(query_cluster, dim=-1, stable=True)
    position, start = query_order + offset, of_rows * n_k
    high = torch.searchsorted(code, start + position)
    reach = position if left is None else position.clamp(max=left)
    low = torch.searchsorted(code, start + position - reach)
    low = torch.maximum(low, high - (window - 1))
    layout = range_layout(low, high, n_k, min(window - 1, n_k))
    return [own, BlockPart(layout, query_index=query_order, key_index=key_order)]


def last_row_plan(query_cluster: Tensor, key_cluster: Tensor, window: int, left: int | None) -> list[Part]:
    """:func:`causal_plan` of the last position alone (a decoding step): its keys by index, nothing sorted."""
    n_k = key_cluster.shape[2]
    group = query_cluster.shape[1] // key_cluster.shape[1]
    position = torch.arange(n_k, device=key_cluster.device)
    readable = key_cluster.repeat_interleave(group, 1) == query_cluster
    readable = readable & (position < n_k - 1)
    if left is not None:
        readable = readable & (n_k - 1 - position <= left)
    count = min(window - 1, n_k - 1)
    keys = torch.where(readable, position, -1).topk(count, dim=-1).values
    own = torch.full_like(keys[..., :1], n_k - 1) if count else torch.full_like(query_cluster, n_k - 1)
    index = torch.cat([keys, own], dim=-1)
    return [SegmentPart(1, count + 1, 1, count + 1, key_index=index)]


@plan_rule(CLUSTERS)
def _causal_parts(data: PlanData) -> list[Part]:
    """Tensors: clusters of the queries and of the keys. Numbers: window, left."""
    query_cluster, key_cluster = data.tensors
    window, left = data.numbers
    if window is None:
        raise RuntimeError("the rule needs a window")
    make = last_row_plan if data.query_length == 1 else causal_plan
    return make(query_cluster, key_cluster, window, left)


def expired(key_cluster: Tensor, window: int) -> Tensor:
    """Which keys have ``window - 1`` later ones in their cluster, so that no row to come reads them; bool of the shape
    ``[B, Hkv, N]``."""
    of_sorted, order = torch.sort(key_cluster, dim=-1, stable=True)
    end = torch.searchsorted(of_sorted, of_sorted, right=True)
    later = end - 1 - torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(later).scatter(-1, order, later) >= window - 1


# Scores ranked at once on the CPU: 2 MB as int64 (16,384 tokens, 128 clusters, 8 heads: 0.26 s on one core, all at
# once 0.34 s and 134 MB).
RANKED_ON_CPU = 2**18

# -- bidirectional -------------------------------------------------------------------------------------------------


def cluster_members(vectors: Tensor, centroids: Tensor, window: int) -> Tensor:
    """The ``window`` vectors ``[G, H, n, d]`` nearest to each of ``centroids [H, k, d]``: positions, ascending in each
    cluster, int64 ``[G, H, k, window]``. Equally near ones are taken in the order of their positions."""
    with torch.autocast(vectors.device.type, enabled=False):
        scores = normalize(centroids.to(vectors.dtype), dim=-1) @ vectors.transpose(-1, -2)
    if scores.dtype == torch.float64:
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :window]
    else:
        rows = scores.flatten(0, -2)
        at_once = max(1, RANKED_ON_CPU // scores.shape[-1]) if rows.device.type == "cpu" else len(rows)
        chosen = [torch.topk(_ranked(part), window, dim=-1, sorted=False).indices for part in rows.split(at_once)]
        order = torch.cat(chosen).view(*scores.shape[:-1], window)
    return order.sort(dim=-1).values


def _ranked(scores: Tensor) -> Tensor:
    """Scores (32 bits or fewer) as int64 in the same order, equal ones by position: the upper half holds the score,
    the lower the distance from the end. Choosing the largest of them needs no stable sort of the whole row."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    from_end = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return ordered.long().mul_(2**32).add_(from_end)


def cluster_ranges(rows: Tensor, columns: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """The key slots ``low <= slot < high`` of each query slot's cluster that the band allows, ``[G, H, k * window]``.

    Args: rows, columns: the positions of the members, int64 ``[G, H, k, window]``.
    """
    window = rows.shape[-1]
    first = torch.arange(0, rows.shape[-2] * window, window, device=rows.device)[:, None]
    low, high = first.expand_as(rows), (first + window).expand_as(rows)
    if band.left is not None:
        low = first + torch.searchsorted(columns, rows - band.left)
    if band.right is not None:
        high = first + torch.searchsorted(columns, rows + band.right, right=True)
    return low.flatten(2), torch.maximum(low, high).flatten(2)


@plan_rule(MEMBERS)
def _member_parts(data: PlanData) -> list[Part]:
    """Attention inside the clusters. Tensors: rows and columns as in :func:`cluster_ranges`. Numbers: the band."""
    rows, columns = data.tensors
    band, window, slots = Band(*data.numbers), rows.shape[-1], data.query_length
    query_index, key_index = rows.flatten(2), columns.flatten(2)
    if band.unbounded:
        return [SegmentPart(slots, slots, window, window, query_index=query_index, key_index=key_index)]
    layout = range_layout(*cluster_ranges(rows, columns, band), slots, window)
    return [BlockPart(layout, query_index=query_index, key_index=key_index)]


def cluster_means(out: Tensor, rows: Tensor, filled: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The mean of a position's results over its clusters, ``[G, H, length, D]``, and their number ``[G, H, length]``.

    Args: out: results per slot ``[G, H, slots, D]``; rows: their positions; filled: the slots that count.
    """
    index = rows.flatten(2)
    total = sum_slots(out, index, out.shape[1], length)
    # Whole numbers: their sum has no order.
    count = torch.zeros(total.shape[:3], dtype=total.dtype, device=out.device)
    count = count.scatter_add(2, index, filled.to(total.dtype))
    return (total / count.clamp(min=1).unsqueeze(-1)).to(out.dtype), count


@plan_rule(UNCOVERED)
def _uncovered_parts(data: PlanData) -> list[Part]:
    """The window of the positions that are in no cluster. Tensors: their number of clusters ``[G, H, n]``. Numbers:
    the window ``|i - j| < w``, the band."""
    covered, n = data.tensors[0] > 0, data.key_length
    local_window, left, right = data.numbers
    if local_window is None:
        raise RuntimeError("the rule needs a window")
    # The host knows the number of rows on the CPU; elsewhere any of them may need a slot.
    rows = int((~covered).sum(-1).max()) if exact_lists(covered.device) else n
    if rows == 0:
        return []
    order = torch.sort(covered.to(torch.uint8), dim=-1, stable=True).indices[..., :rows]
    listed = ~covered.gather(-1, order)
    behind, ahead = (local_window - 1 if side is None else min(side, local_window - 1) for side in (left, right))
    low = torch.where(listed, (order - behind).clamp(min=0), n)
    high = torch.where(listed, (order + ahead + 1).clamp(max=n), n)
    layout = range_layout(low, high, n, behind + ahead + 1)
    return [BlockPart(layout, query_index=torch.where(listed, order, -1))]
