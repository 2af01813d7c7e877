"""Spherical k-means on routing vectors, the same on every run: its choices are counter-based."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sa_hf.patterns.selection import nearest_centroid

ITERATIONS = 10


def cluster_counts(cluster: Tensor, num_clusters: int, weight: Tensor) -> Tensor:
    """The counts of :func:`cluster_sums` alone: sums of whole numbers, so their order does not matter."""
    weight = weight.expand(cluster.shape).float()
    counts = weight.new_zeros(*cluster.shape[:-1], num_clusters).scatter_add(-1, cluster, weight)
    return counts.flatten(0, -3).sum(0) if counts.dim() > 2 else counts


def kmeans(x: Tensor, num_clusters: int, draws: Tensor) -> Tensor:
    """Centroids ``[heads, num_clusters, d]``: the means of clusters by cosine.

    Args:
        x: ``[heads, n, d]``.
        draws: ``[heads, num_clusters]`` in (0, 1), for the starting points (k-means++, Arthur & Vassilvitskii 2007).
    """
    unit = normalize(x, dim=-1)
    centroids = _starting_points(unit, num_clusters, draws)
    for _ in range(ITERATIONS):
        sums, counts = cluster_sums(x, nearest_centroid(unit, centroids, norm=False), num_clusters)
        centroids = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp(min=1), centroids)
    return centroids


def _starting_points(unit: Tensor, num_clusters: int, draws: Tensor) -> Tensor:
    heads, n, _ = unit.shape
    every = torch.arange(heads, device=unit.device)
    chosen = unit[every, (draws[:, 0] * n).long().clamp(max=n - 1)]
    points = [chosen]
    distance = torch.full((heads, n), torch.inf, device=unit.device, dtype=unit.dtype)
    for c in range(1, num_clusters):
        closeness = (unit @ chosen.unsqueeze(-1)).squeeze(-1)
        distance = torch.minimum(distance, (1 - closeness).clamp(min=0))
        mass = distance.double().cumsum(-1)
        at = torch.searchsorted(mass, draws[:, c : c + 1].to(mass) * mass[:, -1:]).clamp(max=n - 1)
        chosen = unit[every, at[:, 0]]
        points.append(chosen)
    return torch.stack(points, dim=1)


def cluster_sums(x: Tensor, cluster: Tensor, num_clusters: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums ``[heads, k, d]`` and counts ``[heads, k]`` of the vectors ``x [..., heads, n, d]`` of each cluster.

    Args: cluster int64 ``[..., heads, n]``; weight broadcastable to it, None is 1.
    """
    member = (cluster.unsqueeze(-1) == torch.arange(num_clusters, device=x.device)).to(x.dtype)
    if weight is not None:
        member = member * weight.to(x.dtype).unsqueeze(-1)
    # A product, not an index_add: the order of its sums does not vary from run to run.
    sums, counts = member.transpose(-1, -2) @ x, member.sum(-2)
    return sums.flatten(0, -4).sum(0) if sums.dim() > 3 else sums, counts.flatten(0, -3).sum(
        0
    ) if counts.dim() > 2 else counts
