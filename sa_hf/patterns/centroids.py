"""The centroids of routing attention: where they start, what a forward gathers, and how they move after a step.

A forward only gathers statistics. They are keyed by the micro-batch and overwritten, so a recomputation under gradient
checkpointing counts nothing twice; the centroids move in :func:`update_centroids`, once per optimizer step after it
(``sa_hf.hf.forward.centroids`` sees to that).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import layer_norm

from sa_hf.config import SparseAttentionConfig
from sa_hf.layer import LayerSpec
from sa_hf.ops.grouped import real_queries
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.kmeans import cluster_counts, cluster_sums, kmeans
from sa_hf.patterns.learned import LearnedAttention, seeded_uniform

SAMPLED_TOKENS = 2048  # of the first training batch, for k-means; its cost is tokens x clusters x iterations
RESEED_STREAM = 1


@dataclass(eq=False)
class Statistics:
    """What one micro-batch says: sums ``[kv, k, d]`` and counts ``[kv, k]`` of its queries and keys, and one of its
    vectors for each centroid ``[kv, k, d]``, should that need a new start."""

    sums: Tensor
    counts: Tensor
    candidates: Tensor


class CentroidState(LearnedAttention):
    """Buffers ``centroids`` fp32 ``[key heads, k, d]``, ``empty_steps`` int64 ``[key heads, k]`` (steps without a
    member) and ``initialized`` bool (k-means has run), and their movement."""

    centroids: Tensor
    empty_steps: Tensor
    initialized: Tensor

    def __init__(
        self, config: SparseAttentionConfig, spec: LayerSpec, key_heads: int, num_clusters: int, decay: float,
        reseed_after: int,
    ) -> None:  # fmt: skip
        super().__init__(config, spec)
        self.num_clusters, self.decay, self.reseed_after = num_clusters, decay, reseed_after
        start = random_directions(
            config.seed, (spec.layer_idx, self.heads[0]), (key_heads, num_clusters, spec.head_dim), spec.device
        )
        self.register_buffer("centroids", start)
        self.register_buffer("empty_steps", torch.zeros(key_heads, num_clusters, dtype=torch.int64, device=spec.device))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=spec.device))
        self._is_initialized: bool | None = None  # the buffer as last read: reading it anew would wait for the device
        # Of the micro-batches since the last update: a recomputation may count the latest anew, the others are one sum.
        # (No numbers of micro-batches: torch.compile would trace anew for each.)
        self._latest: Statistics | None = None
        self._earlier: Statistics | None = None
        self._sample: Tensor | None = None  # of the first micro-batch: [kv, vectors, d]
        self._sample_is_settled = False
        self._sizes: Tensor | None = None
        # What sizes are still to be counted from: clusters of queries and keys, and which tokens are real.
        self._counted: tuple[tuple[Tensor, Tensor], Tensor | Sequences] | None = None

    def advance_step(self) -> None:
        super().advance_step()
        if self._latest is not None:
            self._earlier, self._latest = self._gathered(), None
        self._sample_is_settled = self._sample is not None

    def _gathered(self) -> Statistics | None:
        """Everything since the last update; the candidates are the latest ones."""
        if self._latest is None or self._earlier is None:
            return self._earlier if self._latest is None else self._latest
        sums, counts = self._earlier.sums + self._latest.sums, self._earlier.counts + self._latest.counts
        return Statistics(sums, counts, self._latest.candidates)

    def _forget(self) -> None:
        self._latest = self._earlier = self._sample = None
        self._sample_is_settled = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_initialized = None

    def __getstate__(self) -> dict[str, Any]:
        forgotten = dict.fromkeys(("_latest", "_earlier", "_sample", "_is_initialized"))
        return {**super().__getstate__(), **forgotten, "_sample_is_settled": False}

    @torch.no_grad()
    def gather(self, query: Tensor, key: Tensor, clusters: tuple[Tensor, Tensor], real: Tensor) -> None:
        """Note the routing vectors of a forward: query ``[B, H, N, d]``, key ``[B, kv, N, d]`` (read in training
        alone), their clusters ``[B, H | kv, N]``, and which tokens are real, bool ``[B, N]``."""
        if self.steps_back:  # a recomputation after a later forward: counted already, under its own number
            return
        if not self.training:
            self._counted = clusters, real  # figures alone ask for sizes
            return
        kv, both, weight = key.shape[1], _side_by_side(clusters), real[:, None, None]
        vectors = torch.cat([query.unflatten(1, (kv, -1)), key.unsqueeze(2)], dim=2).transpose(1, 2)
        sums, counts = cluster_sums(vectors.float(), both, self.num_clusters, weight)
        self._sizes, self._counted = counts, None
        tokens = torch.sort((~real).flatten().to(torch.uint8), stable=True).indices  # the real ones first
        count = real.sum()
        u = self.uniform(counts.numel(), layer=self.spec.layer_idx, stream=RESEED_STREAM).view_as(counts)
        flat_keys = key.float().transpose(0, 1).flatten(1, 2)
        chosen = tokens[(u * count).long().clamp(max=len(tokens) - 1)]
        candidates = torch.gather(flat_keys, 1, chosen.unsqueeze(-1).expand(-1, -1, key.shape[-1]))
        self._latest = Statistics(sums, counts, candidates)
        if self._needs_kmeans() and not self._sample_is_settled:
            size = min(SAMPLED_TOKENS, len(tokens))
            spread = (torch.arange(size, device=real.device) + 0.5) * count / size
            at = tokens[spread.long().clamp(max=len(tokens) - 1)]
            # [B, group + 1, kv, N, d] -> [kv, tokens, group + 1, d]
            flat = vectors.float().permute(2, 0, 3, 1, 4).flatten(1, 2)
            self._sample = flat[:, at].flatten(1, 2)

    def _needs_kmeans(self) -> bool:
        if self._is_initialized is None:
            if torch.compiler.is_compiling():  # a buffer cannot be read there; a sample too many costs little
                return True
            self._is_initialized = bool(self.initialized)
        return not self._is_initialized

    def update_centroids(self) -> None:
        """Move the centroids by what was gathered since the last call; see :func:`update_centroids`."""
        update_centroids([self])

    def cluster_sizes(self) -> list[list[int]] | None:
        """Tokens (queries and keys) of each cluster in the forward of :meth:`cluster_figures`, a list for each key
        head; None where there is none."""
        sizes = self._cluster_sizes()
        return None if sizes is None else sizes.long().tolist()

    def _cluster_sizes(self) -> Tensor | None:
        if self._counted is not None:
            clusters, real = self._counted
            real = real if isinstance(real, Tensor) else real_queries(real, clusters[0].device)
            counts = cluster_counts(_side_by_side(clusters), self.num_clusters, real[:, None, None])
            self._sizes, self._counted = counts, None
        return self._sizes

    def cluster_figures(self) -> dict[str, float]:
        """Sizes and entropy (nats, mean over heads) of the clusters of the last forward, bidirectional ones in training
        mode alone (in eval mode those need no clusters)."""
        sizes = self._cluster_sizes()
        if sizes is None:
            return {}
        share = sizes / sizes.sum(-1, keepdim=True).clamp(min=1)
        entropy = -(share * torch.log(share.clamp(min=1e-30))).sum(-1).mean()
        return {"cluster_entropy": float(entropy), "cluster_max": float(sizes.max()), "cluster_min": float(sizes.min())}


def _side_by_side(clusters: tuple[Tensor, Tensor]) -> Tensor:
    """Those of a group's queries and of its keys: ``[B, H, N]`` and ``[B, kv, N]`` to ``[B, group + 1, kv, N]``."""
    queries, keys = clusters
    return torch.cat([queries.unflatten(1, (keys.shape[1], -1)), keys.unsqueeze(2)], dim=2).transpose(1, 2)


def random_directions(seed: int, words: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Directions that depend on the seed and the words alone, with the length of normalised vectors."""
    count = math.prod(shape)
    uniform = seeded_uniform(seed, words, 2 * count, device)
    # Box-Muller
    normal = torch.sqrt(-2 * torch.log(uniform[:count])) * torch.cos(2 * math.pi * uniform[count:])
    return layer_norm(normal.view(shape), shape[-1:]).float()


@torch.no_grad()
def update_centroids(layers: Sequence[CentroidState]) -> None:
    """Move the centroids of all layers: k-means at the first call (on rank 0, then broadcast), the running mean later.

    Call it once per optimizer step, after it, on every rank alike: it reduces over the default process group. Without
    anything gathered (evaluation) the centroids stay.
    """
    if not layers:
        return
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    main = ranks == 1 or dist.get_rank() == 0
    totals = [_total(layer, main) for layer in layers]
    if ranks > 1:
        flat = torch.cat([x.flatten() for total in totals for x in total])
        dist.all_reduce(flat)
        sizes = [x.numel() for total in totals for x in total]
        pieces = iter(flat.split(sizes))
        totals = [tuple(next(pieces).view_as(x) for x in total) for total in totals]
    for layer, (sums, counts, candidates, sampled) in zip(layers, totals, strict=True):
        if layer._needs_kmeans():
            if bool(sampled > 0):
                _start(layer, main, ranks)
        elif layer._gathered() is not None or ranks > 1:
            _move(layer, sums, counts, candidates)
        layer._forget()


def _total(layer: CentroidState, main: bool) -> tuple[Tensor, ...]:
    """Sums, counts, candidates (the main rank's alone), and whether the main rank has a sample for k-means."""
    gathered = layer._gathered()
    mu = layer.centroids.float()
    sums, counts, candidates = torch.zeros_like(mu), torch.zeros_like(mu[..., 0]), torch.zeros_like(mu)
    if gathered is not None:
        sums, counts = gathered.sums, gathered.counts
        candidates = gathered.candidates if main else candidates
    return sums, counts, candidates, mu.new_full((), float(main and layer._sample is not None))


def _start(layer: CentroidState, main: bool, ranks: int) -> None:
    start = layer.centroids.float()
    if main and layer._sample is not None:
        words = (layer.spec.layer_idx, layer.heads[0], layer.num_clusters)
        draws = seeded_uniform(layer.config.seed, words, layer.empty_steps.numel(), start.device)
        start = kmeans(layer._sample, layer.num_clusters, draws.view_as(layer.empty_steps))
    start = start.contiguous()
    if ranks > 1:
        dist.broadcast(start, src=0)
    layer.centroids.copy_(start)
    layer.initialized.fill_(True)
    layer._is_initialized = True


def _move(layer: CentroidState, sums: Tensor, counts: Tensor, candidates: Tensor) -> None:
    # On every rank alike, and without a read from the device: where no rank gathered anything, nothing moves.
    gathered, filled = counts.sum() > 0, counts > 0
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    moved = layer.decay * layer.centroids.float() + (1 - layer.decay) * mean
    empty = torch.where(filled, 0, layer.empty_steps + gathered)
    usable = candidates.abs().sum(-1) > 0
    reseed = (empty >= layer.reseed_after) & usable
    target = torch.where(filled.unsqueeze(-1), moved, layer.centroids.float())
    layer.centroids.copy_(torch.where(reseed.unsqueeze(-1), candidates, target))
    layer.empty_steps.copy_(empty.masked_fill(reseed, 0))
