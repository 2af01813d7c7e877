"""What a step chooses in C++ is what torch's operators choose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sa_hf.ops.choice import CPP
from sa_hf.ops.cpp.choices import highest_blocks, nearest_clusters
from sa_hf.ops.parts import Band, ScoreOptions
from sa_hf.patterns.block_sets import BlockSets, choose_blocks
from sa_hf.patterns.selection import find_nearest_centroid

pytestmark = pytest.mark.skipif(
    CPP.unsupported(torch.zeros(1), ScoreOptions(1.0)) is not None, reason="the C++ kernels are not there"
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("depth", [5, 8, 64, 100])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("left", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks(depth: int, together: int, left: int | None, dtype: torch.dtype) -> None:
    sets, length, top_k = BlockSets(4, 2, 1, True), 90, 3
    pooled, query = draw(2, 2, 22, depth, seed=1), draw(2, 3, 4, depth).transpose(1, 2).to(dtype)
    pooled[:, :, 7] = pooled[:, :, 3]  # equal scores: the lower block
    rows = torch.arange(length - 3, length)
    vectors = query.unflatten(1, (2, 2)).sum(2, dtype=torch.float64) if together == 2 else query
    of_rows = pooled if together == 2 else pooled.repeat_interleave(2, 1)
    want = choose_blocks(vectors, of_rows, (rows, rows), sets, Band(left), top_k)
    reach = [x for i in rows.tolist() for x in sets.eligible_run(i, left)]
    assert torch.equal(highest_blocks(query, pooled, reach, together, top_k), want)


def test_of_equal_blocks_the_lower_ones_and_where_there_are_few() -> None:
    pooled, query = draw(1, 1, 1, 16).expand(1, 1, 9, 16), draw(1, 1, 4, 16)
    found = highest_blocks(query, pooled, [0, 9, 2, 9, 8, 9, 4, 4], 1, 2)
    assert found[0, 0].tolist() == [[0, 1], [2, 3], [8, -1], [-1, -1]]
    assert highest_blocks(query, pooled[:, :, :0], [0, 0] * 4, 1, 0).shape == (1, 1, 4, 0)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of the first dimensions against each other, as Llama turns them."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = part.chunk(2, -1)
    return torch.cat([part * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None], rest], -1)


@pytest.mark.parametrize("angles", [None, 1, 2], ids=["none", "one for all", "by row"])
@pytest.mark.parametrize(("depth", "turn"), [(64, 64), (40, 16), (7, 4)])
def test_clusters(depth: int, turn: int, angles: int | None) -> None:
    query, key, centroids = draw(2, 4, 3, depth), draw(2, 2, 3, depth, seed=1), draw(2, 50, depth, seed=2) + 0.5
    want = [
        find_nearest_centroid(x, mu, norm=True)
        for x, mu in ((query, centroids.repeat_interleave(2, 0)), (key, centroids))
    ]
    told = None
    if angles is not None:
        at = (draw(angles, 3, turn // 2, seed=3) * 3).repeat(1, 1, 2)
        told = at.cos() * 1.2, at.sin() * 1.2  # scaled, as YaRN does
        query, key = (turned(x, *(y.expand(2, -1, -1) for y in told)) for x in (query, key))
    found = nearest_clusters(query.transpose(1, 2).contiguous().transpose(1, 2), key, centroids, told)
    assert [torch.equal(x, y) for x, y in zip(found, want, strict=True)] == [True, True]


def test_of_equal_centroids_the_first() -> None:
    centroids = draw(1, 1, 32).expand(1, 6, 32)
    queries, keys = nearest_clusters(draw(1, 2, 5, 32), draw(1, 1, 5, 32), centroids, None)
    assert int(queries.max()) == int(keys.max()) == 0
