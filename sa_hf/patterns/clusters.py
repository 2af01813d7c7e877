"""Clusters as parts: which slots of a sorted order a row reads, and the members of balanced clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.data_layout import exact_lists, range_layout
from sa_hf.ops.parts import Band, BlockPart, OffsetsPart, Part, SegmentPart
from sa_hf.ops.planned import PlanData, plan_rule

DECODE_STEP = 64  # keys of a decoded row come in multiples of it, so that few lengths occur
CLUSTERS, MEMBERS = "clusters", "members"  # rules of plans

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


def last_row_of_clusters(query_cluster: Tensor, key_cluster: Tensor, window: int, left: int | None) -> list[Part]:
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
    if not exact_lists(index.device):  # the lists of a segment are made on the host, for each length of it
        index = torch.nn.functional.pad(index, (0, -index.shape[-1] % DECODE_STEP), value=-1)
    slots = index.shape[-1]
    return [SegmentPart(1, slots, 1, slots, key_index=index)]


@plan_rule(CLUSTERS)
def _causal_parts(data: PlanData) -> list[Part]:
    """Tensors: clusters of the queries and of the keys. Numbers: window, left."""
    query_cluster, key_cluster = data.tensors
    window, left = data.numbers
    if window is None:
        raise RuntimeError("the rule needs a window")
    make = last_row_of_clusters if data.query_length == 1 else causal_plan
    return make(query_cluster, key_cluster, window, left)


def expired(key_cluster: Tensor, window: int) -> Tensor:
    """Which keys have ``window - 1`` later ones in their cluster, so that no row to come reads them; bool of the shape
    ``[B, Hkv, N]``."""
    of_sorted, order = torch.sort(key_cluster, dim=-1, stable=True)
    end = torch.searchsorted(of_sorted, of_sorted, right=True)
    later = end - 1 - torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(later).scatter(-1, order, later) >= window - 1


# -- bidirectional -------------------------------------------------------------------------------------------------


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
    """Attention inside the clusters, and the window of the positions in none. Tensors: rows and columns as in
    :func:`cluster_ranges`. Numbers: the window ``|i - j| < w`` (None: no such part), the band."""
    rows, columns = data.tensors
    local_window, left, right = data.numbers
    band, (clusters, window) = Band(left, right), rows.shape[-2:]
    slots, query_index, key_index = clusters * window, rows.flatten(2), columns.flatten(2)
    low, high = cluster_ranges(rows, columns, band)
    inside: Part = (
        SegmentPart(slots, slots, window, window, query_index=query_index, key_index=key_index)
        if band.unbounded
        else BlockPart(range_layout(low, high, slots, window), query_index, key_index)
    )
    if local_window is None:
        return [inside]
    # Whole numbers: their order does not matter.
    clusters_of = torch.zeros(*rows.shape[:2], data.key_length, dtype=torch.int32, device=rows.device)
    clusters_of.scatter_add_(2, query_index, (high > low).int())
    return [inside, *uncovered_parts(clusters_of > 0, local_window, band)]


def uncovered_parts(covered: Tensor, local_window: int, band: Band) -> list[Part]:
    """The window ``|i - j| < local_window`` of the positions that are not covered (bool ``[G, H, n]``)."""
    n = covered.shape[2]
    # The host knows the number of rows on the CPU; elsewhere any of them may need a slot.
    rows = int((~covered).sum(-1).max()) if exact_lists(covered.device) else n
    if rows == 0:
        return []
    order = torch.sort(covered.to(torch.uint8), dim=-1, stable=True).indices[..., :rows]
    listed = ~covered.gather(-1, order)
    behind, ahead = (local_window - 1 if side is None else min(side, local_window - 1) for side in band)
    low = torch.where(listed, (order - behind).clamp(min=0), n)
    high = torch.where(listed, (order + ahead + 1).clamp(max=n), n)
    layout = range_layout(low, high, n, behind + ahead + 1)
    return [BlockPart(layout, query_index=torch.where(listed, order, -1))]
