"""What a learned choice of blocks is trained to: the mass of dense attention on each block, and the distance to it.

The warm-up of DeepSeek Sparse Attention's indexer (DeepSeek-V3.2, section 2.1), with blocks for tokens: the
distribution over blocks is that of dense attention, and nothing but the indexer's own projections learns from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sa_hf.ops.grouped import Group
from sa_hf.ops.parts import Band, ScoreOptions
from sa_hf.patterns.block_sets import BlockSets

SCORES_OF_MASS = 2**22  # 16 MB in fp32: dense rows are computed in pieces of about so many scores


class Index(NamedTuple):
    """What learned projections give of the tokens: ``queries [B, H, Nq, r]``, ``keys [B, Hkv, Nk, r]``."""

    queries: Tensor
    keys: Tensor


def keys_of(group: Group, index: Index | None) -> list[Tensor]:
    """The keys of a group, detached, and what learned projections give of them."""
    key = [group.key.detach()]
    return key if index is None else [*key, group.keys(index.keys)]


def sampled_rows(rows: int, at_most: int, turn: Tensor) -> Tensor:
    """``at_most`` of ``rows`` rows, evenly spaced; the next ones at the next ``turn`` (int64 scalar), so that all have
    theirs: int64 ``[count]``, ``rows`` itself where there is none."""
    stride = -(-rows // max(1, at_most))
    index = torch.arange(-(-rows // stride), device=turn.device) * stride + turn % stride
    return index.clamp(max=rows)


@torch.no_grad()
def block_mass(query: Tensor, positions: Tensor, key: Tensor, block: int, band: Band, options: ScoreOptions) -> Tensor:
    """The part of each query's dense attention that lies on each block, fp32 ``[G, H, P, blocks]`` (fp64 of fp64).

    Args:
        query: ``[G, H, P, D]`` at ``positions``, int64 ``[P]``; key: ``[G, Hkv, n, D]``.
        band: the model's own window, ``right=0`` where causal.
        options: scale, soft cap and distance table of the layer.
    """
    batch, heads = query.shape[:2]
    wide = torch.promote_types(key.dtype, torch.float32)
    length, blocks = key.shape[2], -(-key.shape[2] // block)
    columns = key.to(wide).transpose(-1, -2)
    j = torch.arange(length, device=key.device)
    found = []
    at_once = max(1, SCORES_OF_MASS // max(1, batch * heads * length))
    for some, i in zip(query.to(wide).split(at_once, dim=2), positions.split(at_once), strict=True):
        grouped = some.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [G, Hkv, group * P, D]
        scores = (grouped @ columns).view(batch, heads, -1, length) * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.distance_bias is not None:
            centre = (options.distance_bias.shape[1] + 1) // 2 - 1
            scores = scores + options.distance_bias.to(wide)[:, (j - i[:, None]).clamp(-centre, centre) + centre]
        probability = torch.softmax(scores.masked_fill(~band.contains(i[:, None], j), -torch.inf), dim=-1)
        padded = torch.nn.functional.pad(probability, (0, blocks * block - length))
        found.append(padded.unflatten(-1, (blocks, block)).sum(-1))
    return torch.cat(found, dim=2)


def rows_mass(group: Group, low: Tensor, per_row: int, sets: BlockSets, band: Band) -> Tensor:
    """The same summed over the queries of each row, ``[G, H, R, blocks]``: a group's at the ``per_row`` positions from
    ``low [R]`` on that are new and inside the sequence. ``band`` is the model's own window."""
    offset, length = group.query_offset, group.key.shape[2]
    positions = low[:, None] + torch.arange(per_row, device=low.device)
    real = (positions >= offset) & (positions < length)
    at = positions.clamp(offset, length - 1).flatten()
    band = band.causal_if(sets.causal)
    query = group.query.detach()[:, :, at - offset]
    mass = block_mass(query, at, group.key.detach(), sets.block, band, group.options)
    summed: Tensor = (mass.unflatten(2, positions.shape) * real[:, :, None]).sum(3)
    return summed


def divergence(mass: Tensor, scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over rows of ``KL(mass || softmax(scores))`` among the allowed blocks, and the number of rows that have
    a choice (two blocks or more). The gradient flows through the scores.

    Args: mass, scores ``[G, C, R, blocks]``; allowed: bool, broadcastable to them.
    """
    allowed = allowed.expand(scores.shape)
    choice = allowed.sum(-1) > 1
    target = torch.where(allowed, mass, 0.0).clamp(min=0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    lowest = torch.finfo(scores.dtype).min
    log_chosen = torch.log_softmax(scores.masked_fill(~allowed, lowest), dim=-1)
    of_rows = (torch.xlogy(target, target) - target * log_chosen.masked_fill(~allowed, 0.0)).sum(-1)
    return of_rows.masked_fill(~choice, 0.0).sum(), choice.sum()
