"""Nearest centroids and nearest vectors, against plain sorts; ties by index."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sa_hf.patterns import selection
from sa_hf.patterns.selection import nearest_centroid, nearest_vectors


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def products(vectors: Tensor, centroids: Tensor) -> Tensor:
    """``[..., heads, k, n]``"""
    unit = centroids.to(vectors.dtype) / centroids.to(vectors.dtype).norm(dim=-1, keepdim=True)
    return unit @ vectors.transpose(-1, -2)


def first_in_order(scores: Tensor, count: int) -> Tensor:
    """Columns of the largest scores, equal ones by position, ascending."""
    rows = [
        sorted(sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))[:count])  # type: ignore[misc]
        for row in scores.flatten(0, -2).tolist()
    ]
    return torch.tensor(rows).view(*scores.shape[:-1], count)


@pytest.mark.parametrize("at_once", [1, 40, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_centroid(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SCORES_ON_CPU", at_once)
    vectors, centroids = draw(2, 3, 17, 8, seed=0, dtype=dtype), draw(3, 5, 8, seed=1)
    assert torch.equal(nearest_centroid(vectors, centroids, False), products(vectors, centroids).argmax(-2))
    normal = torch.nn.functional.layer_norm(vectors, (8,))
    assert torch.equal(nearest_centroid(vectors, centroids, True), products(normal, centroids).argmax(-2))
    # Whole numbers on axes: equal products are exactly equal, and the lower index is taken.
    whole = torch.randint(-1, 2, (2, 3, 40, 8), generator=torch.Generator().manual_seed(2)).to(dtype)
    axes = torch.eye(8).expand(3, 8, 8)
    first = torch.tensor([row.index(max(row)) for row in whole.flatten(0, -2).tolist()]).view(2, 3, 40)
    assert torch.equal(nearest_centroid(whole, axes, False), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize(("n", "count"), [(64, 7), (64, 8), (64, 63), (64, 64), (61, 7), (1, 1), (4096, 100)])
def test_nearest_vectors(n: int, count: int, levels: int, dtype: torch.dtype) -> None:
    """Few levels: most scores are equal."""
    directions = torch.nn.functional.one_hot(torch.arange(4), 4).to(dtype)
    sizes = torch.randint(levels, (2, 2, n, 1), generator=torch.Generator().manual_seed(n)).to(dtype)
    vectors = sizes * directions[torch.arange(n) % 4]
    found = nearest_vectors(vectors, directions[:3].expand(2, 3, 4), count, False)
    assert torch.equal(found, first_in_order(vectors[..., :3].transpose(-1, -2), count))


def test_registered_whole() -> None:
    vectors, centroids = draw(1, 2, 16, 4, seed=0), draw(2, 3, 4, seed=1)
    torch.library.opcheck(nearest_centroid, (vectors, centroids, True))
    torch.library.opcheck(nearest_vectors, (vectors, centroids, 3, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "k"), [(16, 4), (24, 3), (64, 4), (80, 1)])
def test_equal_vectors_are_taken_by_position_wherever_they_stand(d: int, k: int, dtype: torch.dtype) -> None:
    """Repeated tokens: which kernel of a matrix product makes a score depends on its place, and rounds differently."""
    for n in (17, 22, 26, 31, 33, 59, 61, 67, 74, 130, 257):
        distinct = draw(max(2, n // 3), d, seed=n, dtype=dtype)
        member = torch.randint(0, len(distinct), (n,), generator=torch.Generator().manual_seed(n))
        centroids = draw(1, k, d, seed=n + 1, dtype=dtype)
        exact = products(torch.nn.functional.layer_norm(distinct.double(), (d,)), centroids.double())[..., member]
        found = nearest_vectors(distinct[member][None], centroids, max(1, n // 4), True)
        assert torch.equal(found, first_in_order(exact, max(1, n // 4))), n
