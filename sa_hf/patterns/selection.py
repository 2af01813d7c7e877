"""Choosing by cosine: the centroid nearest to each vector, and the vectors nearest to each centroid.

Registered operators without a gradient. On the CPU they work in pieces whose scores stay in the cache: 16,384 tokens,
128 clusters and 8 heads have 64 MB of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from sa_hf.ops.graphs import eager
from sa_hf.ops.host import own_rules

SCORES_ON_CPU = 2**19  # 2 MB in fp32
CLASSES = 8  # see _largest_on_cpu
# In units of rounding (eps) times the vectors' length: how far two kernels may be apart about one product (sums of 16
# lanes over head_dim 256), and within what scores count as equal (vectors of equal tokens, from products themselves).
NEAR, EQUAL = 16, 2
PAIRS_AT_ONCE = 2**16


def find_nearest_centroid(vectors: Tensor, centroids: Tensor, norm: bool) -> Tensor:
    """The centroid nearest to each vector, int64 ``[..., heads, n]``; the lower one of equally near ones.

    Args: vectors ``[..., heads, n, d]``, fp32 or fp64; centroids ``[heads, k, d]``; norm: LayerNorm (without scale and
        bias) of the vectors first.
    """
    plain = eager(vectors, centroids) and not torch._C._are_functorch_transforms_active()
    if not plain:
        found: Tensor = nearest_centroid(vectors, centroids, norm)
        return found
    with torch.no_grad():
        return _nearest_centroid(vectors, centroids, norm)


def _nearest_centroid(vectors: Tensor, centroids: Tensor, norm: bool) -> Tensor:
    lanes, unit = _lanes(vectors, centroids)
    if norm:
        # LayerNorm takes the mean from a vector and scales it. The scale changes no choice, and x - mean(x) has the
        # product with a centroid that x has with the centroid less its mean.
        unit = unit - unit.mean(-1, keepdim=True)
    chosen = torch.empty(lanes.shape[:2], dtype=torch.int64, device=lanes.device)
    with own_rules(lanes.device):
        for some, tokens in _pieces(lanes, unit.shape[1]):
            chosen[some, tokens] = _first_largest(lanes[some, tokens] @ unit[some].transpose(-1, -2))
    return chosen.view(vectors.shape[:-1])


nearest_centroid = torch.library.custom_op("sa_hf::nearest_centroid", _nearest_centroid, mutates_args=())


def _first_largest(scores: Tensor) -> Tensor:
    """Column of the largest of each row, int64; the first of equal ones.

    Scores in fp32 are used up on the CPU, where torch's maximum without its index runs through vector instructions and
    that with the index does not.
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.max(-1).indices
    # 0 at the largest and below it elsewhere: the sign bit, then numbers that fall from column to column.
    words = scores.sub_(scores.amax(-1, keepdim=True)).view(torch.int32)
    last = scores.shape[-1] - 1
    from_end = torch.arange(last, -1, -1, dtype=torch.int32)
    words = words.bitwise_and_(torch.iinfo(torch.int32).min).bitwise_or_(from_end)
    return last - words.amax(-1).clamp_(0, last).long()


@torch.library.custom_op("sa_hf::nearest_vectors", mutates_args=())
def nearest_vectors(vectors: Tensor, centroids: Tensor, count: int, norm: bool) -> Tensor:
    """The ``count`` vectors nearest to each centroid: positions, ascending in each cluster, int64
    ``[..., heads, k, count]``; equally near ones (on the CPU: to rounding) in the order of their positions.

    Args: as for :func:`nearest_centroid`; ``count <= n``.
    """
    lanes, unit = _lanes(vectors, centroids)
    n, k = lanes.shape[1], unit.shape[1]
    at_once = 1 if lanes.device.type == "cpu" else len(lanes)
    # One for all: new memory for each lane would take as long as the product.
    scores = lanes.new_empty(min(at_once, len(lanes)), k, n)
    chosen = []
    with own_rules(lanes.device):
        for x, mu in zip(lanes.split(at_once), unit.split(at_once), strict=True):
            x = layer_norm(x, x.shape[-1:]) if norm else x
            torch.bmm(mu, x.transpose(-1, -2), out=scores)
            if lanes.device.type != "cpu":
                chosen.append(_largest_by_position(scores.view(-1, n), count))
            else:
                chosen.append(_largest(scores[0], count, x[0], mu[0], x.shape[-1] ** 0.5 if norm else None))
    order = torch.cat(chosen).view(*vectors.shape[:-2], k, count)
    return order.sort(dim=-1).values


@nearest_centroid.register_fake
def _(vectors, centroids, norm):  # type: ignore[no-untyped-def]  # signature fixed by the operator
    return vectors.new_empty(vectors.shape[:-1], dtype=torch.int64)


@nearest_vectors.register_fake
def _(vectors, centroids, count, norm):  # type: ignore[no-untyped-def]  # signature fixed by the operator
    return vectors.new_empty(*vectors.shape[:-2], centroids.shape[1], count, dtype=torch.int64)


def _lanes(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors ``[lanes, n, d]`` and, of each lane, the centroids of length 1 ``[lanes, k, d]``."""
    unit = normalize(centroids.to(vectors.dtype), dim=-1)
    return vectors.flatten(0, -3), unit.expand(*vectors.shape[:-3], *unit.shape).flatten(0, -3)


def _pieces(lanes: Tensor, num_centroids: int) -> Iterator[tuple[slice, slice]]:
    """Runs of lanes and tokens with few scores; off the CPU everything at once."""
    count, n = lanes.shape[:2]
    tokens, at_once = n, count
    if lanes.device.type == "cpu":
        tokens = min(n, max(1, SCORES_ON_CPU // num_centroids))
        at_once = max(1, SCORES_ON_CPU // (num_centroids * max(n, 1)))
    for lane in range(0, count, max(at_once, 1)):
        for token in range(0, n, max(tokens, 1)):
            yield slice(lane, lane + at_once), slice(token, token + tokens)


def _largest(scores: Tensor, count: int, vectors: Tensor, unit: Tensor, longest: float | None) -> Tensor:
    """Columns of the ``count`` largest of each row of ``scores [k, n]``, equal ones by position, in any order.

    Equal vectors have equal scores only up to rounding: which kernel of a matrix product makes a column depends on its
    place, so on the padding beside it. Where the last one chosen and the first one left out are that near, the scores
    of all near ones are computed anew, and those of a few units of rounding apart count as equal.

    Args: ``scores = unit [k, d] @ vectors [n, d]^T``; longest: no vector is longer, None where that is not known.
    """
    if count >= scores.shape[1]:
        return torch.arange(scores.shape[1]).expand_as(scores)
    chosen, least, next_one = _largest_on_cpu(scores, count)
    longest = float(torch.linalg.vector_norm(vectors, dim=-1).amax()) if longest is None else longest
    near = NEAR * torch.finfo(scores.dtype).eps * longest
    close = torch.nonzero(least - next_one <= near).flatten()
    if len(close):
        chosen[close] = _settled(scores[close], least[close, None], near, count, vectors, unit[close])
    return chosen


def _settled(scores: Tensor, least: Tensor, near: float, count: int, vectors: Tensor, unit: Tensor) -> Tensor:
    """Columns of the ``count`` largest where some within ``near`` of the least of them are left out."""
    certain = scores > least + near
    row, column = torch.nonzero((scores - least).abs() <= near, as_tuple=True)
    exact = torch.cat(
        [
            (vectors[some].double() * unit[of].double()).sum(-1)
            for some, of in zip(column.split(PAIRS_AT_ONCE), row.split(PAIRS_AT_ONCE), strict=True)
        ]
    ).to(scores.dtype)
    # By row, then by score, then by position; what is nearer than rounding to the one before counts as equal to it.
    order = torch.sort(exact, descending=True, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    row, column, exact = row[order], column[order], exact[order]
    apart = (exact.diff() < -near / NEAR * EQUAL) | (row.diff() > 0)
    level = torch.nn.functional.pad(apart.cumsum(0), (1, 0))
    order = torch.sort(level * scores.shape[1] + column).indices
    row, column = row[order], column[order]
    first = torch.searchsorted(row, torch.arange(len(scores)))
    taken = torch.arange(len(row)) - first[row] < (count - certain.sum(-1))[row]
    certain[row[taken], column[taken]] = True
    return torch.nonzero(certain)[:, 1].view(len(scores), count)


def _largest_on_cpu(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the ``count < n`` largest, the least of them, and the largest of all others ``[rows]``.

    The columns fall into classes of ``CLASSES`` each. The ``count`` largest lie in the ``count`` classes with the
    largest maxima, so most columns are never ranked.
    """
    rows, n = scores.shape
    classes = n // CLASSES
    if n % CLASSES or classes <= count:
        found = torch.topk(scores, count + 1, dim=-1)
        return found.indices[:, :count].clone(), found.values[:, count - 1], found.values[:, count]
    members = scores.view(rows, CLASSES, classes)
    best = torch.topk(members.amax(1), count + 1, dim=-1)
    at = best.indices[:, :count]
    listed = members.gather(2, at[:, None, :].expand(-1, CLASSES, -1)).flatten(1)
    found = torch.topk(listed, count + 1, dim=-1)
    place = found.indices[:, :count]
    columns = torch.div(place, count, rounding_mode="floor") * classes + at.gather(1, place % count)
    return columns, found.values[:, count - 1], torch.maximum(found.values[:, count], best.values[:, count])


def _largest_by_position(scores: Tensor, count: int) -> Tensor:
    if scores.dtype == torch.float64:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.topk(ranked(scores), count, dim=-1, sorted=False).indices


def ranked(scores: Tensor) -> Tensor:
    """Scores (32 bits or fewer) as int64 in the same order, equal ones by position: the upper half holds the score,
    the lower the distance from the end. Choosing the largest of them needs no stable sort of the whole row."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    from_end = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return ordered.long().mul_(2**32).add_(from_end)
