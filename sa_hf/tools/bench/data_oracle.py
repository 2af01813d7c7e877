"""Dense oracles in fp64 of the patterns whose pairs depend on data: the mask from the data, then an exact softmax.

Written from the papers' definitions, of the benchmark's own cases: whole sequences, no option beside the pattern's. Of
a module (:func:`data_oracle`) spans, clusters and blocks are found anew in fp64; the oracles below take them as given.
No code of an engine, a plan or a layout takes part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from sa_hf.config import SparseAttention
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.reference import dense_attention
from sa_hf.patterns.block_topk import BlockTopKAttention
from sa_hf.patterns.expire_span import ExpireSpanAttention
from sa_hf.patterns.routing import RoutingAttention
from sa_hf.patterns.sparsebert import SparseBertAttention


def data_oracle(
    module: SparseAttention, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, causal: bool
) -> Tensor | None:
    """Attention ``[1, H, n, d]`` of a module in evaluation over one sequence, fp64, differentiable in the vectors.

    Args: query, key, value ``[1, H, n, d]``; hidden ``[1, n, hidden]``, the layer's input.

    Returns:
        None where this module has no oracle here: what is not measured has no figure.
    """
    q, k, v = query.double(), key.double(), value.double()
    if isinstance(module, SparseBertAttention) and module.kept is not None and module.config.structured:
        return _masked(q, k, v, _kept_distances(module.kept, q.shape[2], causal))
    if isinstance(module, ExpireSpanAttention):
        return _expiring(module, q, k, v, hidden)
    if isinstance(module, RoutingAttention) and not (module.local or module.config.shared_qk):
        route = _routed_causal if causal else _routed
        return route(module, q, k, v)
    if isinstance(module, BlockTopKAttention):
        return _masked(q, k, v, _chosen_pairs(module, q[0].detach(), k[0].detach(), causal))
    return None


def _masked(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return dense_attention(q, k, v, kept, ScoreOptions(q.shape[-1] ** -0.5))[0]


def _distances(n: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)


def _kept_distances(kept: Tensor, n: int, causal: bool) -> Tensor:
    """SparseBERT: the distances that a head keeps, bool ``[H, mask_length]``, as pairs ``[H, n, n]``."""
    distance = _distances(n)
    pairs = kept[:, distance.abs().clamp(max=kept.shape[1] - 1)] & (distance.abs() < kept.shape[1])
    pairs = pairs & (distance >= 0) if causal else pairs
    return pairs | ((distance == 0) & ~pairs.any(-1, keepdim=True))


def _expiring(module: ExpireSpanAttention, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    logits = hidden.double() @ module.weight.double().t() + module.bias.double()
    spans = module.config.max_span * torch.sigmoid(logits).transpose(1, 2)  # [1, 1 | H, n]
    return expiring(q, k, v, spans.detach(), module.config.ramp)


def expiring(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, ramp: float) -> Tensor:
    """Expire-Span: weight ``clamp(1 + (e_j - (i - j)) / ramp, 0, 1)`` of an earlier key, 1 of the own; ``spans e
    [B, 1 | H, n]``, in which it is differentiable, too."""
    distance = _distances(q.shape[2])
    gate = (1 + (spans[:, :, None] - distance) / ramp).clamp(0, 1)
    return _masked(q, k, v, torch.where(distance == 0, 1.0, gate).masked_fill(distance < 0, 0.0))


def _cosines(module: RoutingAttention, x: Tensor) -> Tensor:
    """Of normalised vectors and centroids, ``[H, n, clusters]``."""
    return layer_norm(x[0].detach(), x.shape[-1:]) @ normalize(module.centroids.double(), dim=-1).transpose(-1, -2)


def _routed_causal(module: RoutingAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    window = module.config.cluster_window(q.shape[2], causal=True)
    of_query, of_key = (_cosines(module, x).argmax(-1)[None] for x in (q, k))
    return clustered(q, k, v, of_query, of_key, window)


def clustered(q: Tensor, k: Tensor, v: Tensor, of_query: Tensor, of_key: Tensor, window: int) -> Tensor:
    """Routing, causal: the last ``window - 1`` earlier keys of the query's cluster, and the own key; clusters int64
    ``[B, H, n]`` and ``[B, Hkv, n]``."""
    n = q.shape[2]
    of_key = of_key.repeat_interleave(q.shape[1] // k.shape[1], 1)
    mine = (of_query[..., :, None] == of_key[..., None, :]) & (_distances(n) > 0)
    from_end = mine.flip(-1).cumsum(-1).flip(-1)
    return _masked(q, k, v, (mine & (from_end < window)) | torch.eye(n, dtype=torch.bool))


def _routed(module: RoutingAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Routing, bidirectional: each cluster has its ``window`` nearest queries and keys."""
    window = min(q.shape[2], module.config.cluster_window(q.shape[2], causal=False))
    rows, columns = (_cosines(module, x).topk(window, dim=1).indices.transpose(1, 2)[None] for x in (q, k))
    return members(q, k, v, rows, columns, module.config.local_window if module.config.fallback_local else None)


def members(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, local_window: int | None) -> Tensor:
    """Attention inside each cluster, of its queries ``rows`` to its keys ``columns``, int64 ``[B, H, clusters, w]``; a
    token in several clusters takes the mean, one in none the window ``|i - j| < local_window`` (None: 0)."""
    (batch, heads, n, dim), group = q.shape, q.shape[1] // k.shape[1]
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    scores = q[b, h, rows] @ k[b, h // group, columns].transpose(-1, -2) * dim**-0.5
    each = torch.softmax(scores, dim=-1) @ v[b, h // group, columns]
    at = (b.expand_as(rows), h.expand_as(rows), rows)
    total = torch.zeros_like(q).index_put(at, each, accumulate=True)
    count = torch.zeros(batch, heads, n, dtype=torch.float64)
    count = count.index_put(at, torch.ones_like(each[..., 0]), accumulate=True)[..., None]
    mean = total / count.clamp(min=1)
    if local_window is None:
        return mean
    return torch.where(count > 0, mean, _masked(q, k, v, _distances(n).abs() < local_window))


def blocks_chosen(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, window: int, sinks: int) -> Tensor:
    """block_topk, causal: sinks, the window and what each row has chosen, int64 ``[B, H, n, top]``, -1 for none."""
    at = torch.arange(q.shape[2]) // block
    behind = at[:, None] - torch.arange(int(at[-1]) + 1)
    always = (behind >= 0) & ((behind < window) | (behind > at[:, None] - sinks))
    listed = (chosen[..., None] == torch.arange(int(at[-1]) + 1)).any(-2)
    return _masked(q, k, v, (always | listed)[..., at] & (_distances(q.shape[2]) >= 0))


def _chosen_pairs(module: BlockTopKAttention, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """block_topk: sinks, window and the best other blocks of each row, as pairs ``[H, n, n]``. Row by row of blocks;
    ``q [H, n, d]`` and ``k``, of which every head has its own."""
    config, (heads, n, dim) = module.config, q.shape
    b, w = config.block_size, config.num_window_blocks
    blocks, at = -(-n // b), torch.arange(n) // b
    pooled = torch.stack(
        [(k[:, at == j].mean(1) if config.pooling == "mean" else k[:, at == j].amax(1)) for j in range(blocks)], dim=1
    )
    vectors = q
    if config.selection == "query_block":
        means = torch.stack([q[:, at == j].mean(1) for j in range(blocks)], dim=1)
        if causal:  # the block before
            means = torch.cat([torch.zeros(heads, 1, dim, dtype=q.dtype), means[:, :-1]], dim=1)
        vectors = means[:, at]
    distance = at[:, None] - torch.arange(blocks)
    window = (distance >= 0) & (distance < w) if causal else distance.abs() <= w // 2
    always = window | ((torch.arange(blocks) < config.num_sink_blocks) & (distance >= 0 if causal else True))
    open_to_choice = ~always & (distance >= w if causal else torch.ones_like(always))
    scores = (vectors @ pooled.transpose(1, 2)).masked_fill(~open_to_choice, -torch.inf)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., : config.top_k]
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True) & open_to_choice
    pairs = (always | best)[:, :, at]
    return pairs & (_distances(n) >= 0) if causal else pairs
