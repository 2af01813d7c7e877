"""Routing attention: tokens attend inside clusters of their queries and keys (Roy et al. 2021, TACL, arXiv 2003.05997).

Centroids live in a buffer, per key head. Queries and keys are compared with them as normalised copies (LayerNorm
without scale and bias) from before the rotary embedding; the attention itself uses the model's own.

Bidirectional, as published: per centroid the ``w`` nearest queries attend the ``w`` nearest keys; a token in several
clusters gets the mean, a token in none its local result. Causal: the published selection lets a future token displace a
past one. Here each token belongs to its nearest centroid, and row ``i`` reads itself and the last ``w - 1`` keys
``j < i`` of its query's cluster, which no later token changes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from sa_hf.config import (
    SparseAttention,
    SparseAttentionConfig,
    check_bool,
    check_integer,
    check_number,
    register_pattern,
)
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.cpp.choices import nearest_clusters
from sa_hf.ops.cpp.steps import Labelled, PreparedStep
from sa_hf.ops.grouped import Group, key_places, map_groups, real_queries
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.planned import planned_attention
from sa_hf.ops.reads import NOTHING
from sa_hf.ops.sequences import Sequences, refuse_open_length
from sa_hf.patterns.centroids import CentroidState
from sa_hf.patterns.clusters import CLUSTERS, MEMBERS, expired
from sa_hf.patterns.learned import refuse_drop_diagonal
from sa_hf.patterns.selection import find_nearest_centroid, nearest_vectors
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.patterns.static import score_options
from sa_hf.patterns.steps import is_step_in_place, run_step, shared_reads

DEFAULT_CAUSAL_WINDOW = 512


@register_pattern
@dataclass(frozen=True, kw_only=True)
class RoutingAttentionConfig(SparseAttentionConfig):
    """Attention inside learned clusters.

    Args:
        num_clusters: k, centroids per key head.
        window: w, members of a cluster (bidirectional) or keys of a row (causal); None is ceil(n / k) per sequence
            (bidirectional) and 512 (causal).
        num_local_heads: the first heads of the layer, which attend a plain window of ``local_window`` instead.
        local_window: of the local heads, and of tokens in no cluster.
        shared_qk: the keys of the routing heads are their queries, as in the paper.
        fallback_local: bidirectional tokens in no cluster get their local result; else 0.
        decay: of the running mean that a centroid follows, in [0, 1].
        commitment_coef: weight of the mean squared distance of queries and keys to their centroids in the loss, >= 0.
        reseed_after: optimizer steps without a member after which a centroid starts anew at a token of the batch.
    """

    name: ClassVar[str] = "routing"
    reads_before_rotary: ClassVar[bool] = True

    num_clusters: int = 8
    window: int | None = None
    num_local_heads: int = 0
    local_window: int = 512
    shared_qk: bool = False
    fallback_local: bool = True
    decay: float = 0.999
    commitment_coef: float = 0.0
    reseed_after: int = 100

    def validate(self) -> None:
        check_integer(self, "num_clusters", minimum=1, maximum=65536)
        check_integer(self, "window", minimum=1, optional=True)
        check_integer(self, "num_local_heads", minimum=0)
        check_integer(self, "local_window", minimum=1)
        check_bool(self, "shared_qk")
        check_bool(self, "fallback_local")
        check_number(self, "decay", minimum=0.0, maximum=1.0)
        check_number(self, "commitment_coef", minimum=0.0)
        check_integer(self, "reseed_after", minimum=1)
        refuse_drop_diagonal(self, "clusters, not positions, say what is read")

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {"wikitext-103": {"num_clusters": 8, "window": 512}, "enwik8": {"num_clusters": 16, "window": 512}}

    def cluster_window(self, length: int, causal: bool) -> int:
        """w for a sequence of ``length`` tokens."""
        if self.window is not None:
            return self.window
        return DEFAULT_CAUSAL_WINDOW if causal else max(1, -(-length // self.num_clusters))

    def check_layer(self, spec: LayerSpec) -> None:
        heads = spec.num_heads if spec.heads is None else len(spec.heads)
        group = heads // spec.num_key_value_heads
        if spec.sinks and not spec.causal:
            raise SparseAttentionError(
                f"bidirectional routing is a mean of several softmaxes, and the attention sinks of layer "
                f"{spec.layer_idx} belong to the denominator of one; use another pattern, for example 'bigbird'"
            )
        if self.shared_qk and group > 1:
            raise SparseAttentionError(
                f"routing.shared_qk=True makes queries the keys, but {heads} query heads share "
                f"{spec.num_key_value_heads} key heads in layer {spec.layer_idx}; use shared_qk=False"
            )
        if self.shared_qk and spec.heads is not None:
            raise SparseAttentionError(
                "routing.shared_qk=True changes what the keys of a layer are, which a part of a mixture by heads "
                "cannot do; use shared_qk=False"
            )
        if self.num_local_heads >= heads or self.num_local_heads % group:
            choices = list(range(0, heads, group))
            closest = min(choices, key=lambda c: abs(c - self.num_local_heads))
            raise SparseAttentionError(
                f"routing.num_local_heads={self.num_local_heads} must leave a routing head and whole groups of {group} "
                f"query heads in a layer of {heads}; nearest: {closest}"
            )

    def build(self, spec: LayerSpec) -> RoutingAttention:
        return RoutingAttention(self, spec)


class RoutingAttention(CentroidState):
    """The routing heads of one layer, and its local ones. State: see :class:`CentroidState`."""

    remembers = True
    config: RoutingAttentionConfig
    figure_names = ("cluster_entropy", "cluster_max", "cluster_min")

    def __init__(self, config: RoutingAttentionConfig, spec: LayerSpec) -> None:
        config.check_layer(spec)
        heads = tuple(range(spec.num_heads)) if spec.heads is None else spec.heads
        group = len(heads) // spec.num_key_value_heads
        local_keys = config.num_local_heads // group
        super().__init__(
            config, spec, spec.num_key_value_heads - local_keys, config.num_clusters, config.decay, config.reseed_after
        )  # fmt: skip
        self.group = group
        self.local: SparseAttention | None = None
        if local_keys:
            part = replace(spec, heads=heads[: config.num_local_heads], num_key_value_heads=local_keys)
            self.local = SlidingWindowAttentionConfig(window=config.local_window).build(part)
        # Of a causal forward: clusters of the keys [B, kv, Nk], and the slots of these where a cache dropped others.
        self._seen: tuple[Tensor, Sequences, Tensor | None] | None = None

    def forward(self, inputs: AttentionInputs) -> Tensor:
        split = self.config.num_local_heads
        shared = self.config.shared_qk
        routed = self._heads(inputs, slice(split, None)) if split or shared else inputs
        if shared:
            routed.key = inputs.remembered("queries", routed.query, dim=2)
        in_place = inputs.causal and self.config.commitment_coef == 0 and self._in_place(routed)
        out = self._step(routed) if in_place else self._route(routed)
        if self.local is None:
            return out
        return torch.cat([self.local(self._heads(inputs, slice(0, split))), out], dim=1)

    def _heads(self, inputs: AttentionInputs, heads: slice) -> AttentionInputs:
        """The call on some of the query heads (whole groups)."""
        start, stop = heads.start // self.group, None if heads.stop is None else heads.stop // self.group
        keys = slice(start, stop)
        bias = inputs.distance_bias
        return replace(
            inputs,
            query=inputs.query[:, heads],
            key=inputs.key[:, keys],
            value=inputs.value[:, keys],
            distance_bias=None if bias is None else bias[heads],
            sinks=None if inputs.sinks is None else inputs.sinks[heads],
        )

    def _route(self, inputs: AttentionInputs) -> Tensor:
        vectors = self._vectors(inputs)
        observed = inputs.causal or self.training or self.config.commitment_coef > 0
        if not self.training:
            # Of an earlier forward. Evaluation makes fewer figures: no commitment without a coefficient, which takes a
            # pass over all normalised vectors, and no sizes of bidirectional clusters, which it does not need.
            self._unscaled.pop("routing_commitment", None)
            self._sizes = self._counted = None
        clusters = self._observe(vectors, inputs.sequences) if observed else None
        options = score_options(inputs, self.heads[self.config.num_local_heads :])
        if inputs.causal and clusters is not None:
            of_queries = clusters[0]
            of_keys = inputs.remembered("clusters", clusters[1], dim=2)
            if not torch.compiler.is_exporting():  # tensors of a trace mean nothing after it
                self._note_keys(of_keys, inputs)
            if self._in_place(inputs):
                return self._read(inputs, options, self._by_label(of_queries, of_keys, inputs.sequences))

            def attend_group(group: Group) -> Tensor:
                return self._causal(group, of_queries, of_keys, inputs)
        else:
            refuse_open_length(inputs.sequences)
            query, key = (x.detach() for x in vectors)

            def attend_group(group: Group) -> Tensor:
                return self._bidirectional(group, query, key, inputs)

        return map_groups(inputs.query, inputs.key, inputs.value, inputs.sequences, options, attend_group)

    def _step(self, inputs: AttentionInputs) -> Tensor:
        """A step of decoding: clusters are found, and keys are read, where they lie."""
        options = score_options(inputs, self.heads[self.config.num_local_heads :])
        return self._read(inputs, options, self._labelled(inputs))

    def repeated(self, earlier: SparseAttention, step: PreparedStep, inputs: AttentionInputs) -> PreparedStep | None:
        alike = isinstance(earlier, RoutingAttention) and earlier.config == self.config and not self.training
        if not alike or self.config.commitment_coef > 0:  # whose loss is of each forward
            return None
        return step.again(labelled=self._labelled(inputs))

    @torch.no_grad()
    def _labelled(self, inputs: AttentionInputs) -> Labelled:
        """Clusters of a step's rows and of all keys; what is asked after the forward is kept."""
        query, key, turned = inputs.query, inputs.key[:, :, -inputs.query.shape[2] :], None
        if inputs.before_rotary is not None:
            turned = None if inputs.turned_halves is None else inputs.turned_halves()
            if turned is None:
                query, key = self._vectors(inputs)
        of_queries, fresh = nearest_clusters(query, query if self.config.shared_qk else key, self.centroids, turned)
        self._unscaled.pop("routing_commitment", None)  # of an earlier forward
        self._sizes, self._counted = None, ((of_queries, fresh), inputs.sequences)
        of_keys = inputs.remembered("clusters", fresh, dim=2)
        self._note_keys(of_keys, inputs)
        return self._by_label(of_queries, of_keys, inputs.sequences)

    def _note_keys(self, of_keys: Tensor, inputs: AttentionInputs) -> None:
        self._seen = of_keys, inputs.sequences, inputs.key_slots
        inputs.note(self, self._seen)

    def _by_label(self, of_queries: Tensor, of_keys: Tensor, sequences: Sequences) -> Labelled:
        return Labelled(of_keys, of_queries, self.config.cluster_window(sequences.key_length, causal=True) - 1)

    def _read(self, inputs: AttentionInputs, options: ScoreOptions, labelled: Labelled) -> Tensor:
        """What a step's rows read, by the kernel in C++."""
        return run_step(inputs, shared_reads(inputs.sequences, inputs.band.left, NOTHING), options, labelled=labelled)

    def _in_place(self, inputs: AttentionInputs) -> bool:
        no_holes = inputs.sequences.key_gather is None
        return not self.training and no_holes and is_step_in_place(inputs)

    def reads_listed_keys(self, inputs: AttentionInputs) -> bool:
        return self._in_place(inputs)

    def _vectors(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, heads, N, d]`` of the new tokens from before the rotary embedding, fp32 or wider. What
        is compared with the centroids are normalised copies (LayerNorm without scale and bias)."""
        new = inputs.query.shape[2]
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        query, key = inputs.query.to(wide), inputs.key[:, :, -new:].to(wide)
        if inputs.before_rotary is not None:
            query, key = inputs.before_rotary(query, key)
        return query, query if self.config.shared_qk else key

    def _observe(self, vectors: tuple[Tensor, Tensor], sequences: Sequences) -> tuple[Tensor, Tensor]:
        """The clusters of queries and keys, int64 ``[B, heads, N]``; notes the statistics and the commitment loss."""
        query, key = vectors
        mu = self.centroids
        with torch.no_grad():
            of_queries = find_nearest_centroid(query, mu.repeat_interleave(self.group, 0), norm=True)
            of_keys = find_nearest_centroid(key, mu, norm=True)
        clusters, real = (of_queries, of_keys), real_queries(sequences, query.device)
        if self.training or self.config.commitment_coef > 0:
            query, key = (layer_norm(x, x.shape[-1:]) for x in vectors)
        self.gather(query, key, clusters, real)
        if self.config.commitment_coef > 0:
            loss = self._commitment(query, key, clusters, real)
            self._keep_loss("routing_commitment", loss, self.config.commitment_coef)
        elif self.training and not self.steps_back:
            self._unscaled["routing_commitment"] = self._gathered_commitment(query, key, real)
        return clusters

    def _causal(self, group: Group, of_queries: Tensor, of_keys: Tensor, inputs: AttentionInputs) -> Tensor:
        clusters = (group.queries(of_queries.unsqueeze(-1)).squeeze(-1), group.keys(of_keys.unsqueeze(-1)).squeeze(-1))
        window = self.config.cluster_window(group.key.shape[2], causal=True)
        return planned_attention(
            group.query, group.key, group.value, CLUSTERS, group.options, inputs.engine,
            tensors=clusters, numbers=[window, inputs.band.left],
        )  # fmt: skip

    def _bidirectional(self, group: Group, query: Tensor, key: Tensor, inputs: AttentionInputs) -> Tensor:
        n, band = group.key.shape[2], inputs.band
        if group.query_offset:
            raise SparseAttentionError(
                "bidirectional routing attends whole sequences: query and key length must be equal"
            )
        window = min(n, self.config.cluster_window(n, causal=False))
        if self.config.window is not None:
            _warn_if_dearer_than_dense(self.config, n, window)
        with torch.no_grad():
            mu = self.centroids
            rows = nearest_vectors(group.queries(query), mu.repeat_interleave(self.group, 0), window, norm=True)
            columns = nearest_vectors(group.keys(key), mu, window, norm=True).repeat_interleave(self.group, 1)
        local_window = self.config.local_window if self.config.fallback_local and window < n else None
        return planned_attention(
            group.query, group.key, group.value, MEMBERS, group.options, inputs.engine,
            tensors=(rows, columns), numbers=[local_window, *band], mean_slots=self.num_clusters * window,
        )  # fmt: skip

    def _commitment(self, query: Tensor, key: Tensor, clusters: tuple[Tensor, Tensor], real: Tensor) -> Tensor:
        """Mean squared distance of the real routing vectors to their centroids, over queries, keys and dimensions."""
        total, count = query.new_zeros(()), 0
        for x, cluster, repeats in ((query, clusters[0], self.group), (key, clusters[1], 1)):
            mu = self.centroids.detach().to(x.dtype).repeat_interleave(repeats, 0)
            head = torch.arange(x.shape[1], device=x.device)[None, :, None]
            error = (x - mu[head, cluster]).square().mean(-1)
            total = total + error.masked_fill(~real[:, None], 0).sum()
            count += x.shape[1]
        return total / (real.sum() * count).clamp(min=1)

    @torch.no_grad()
    def _gathered_commitment(self, query: Tensor, key: Tensor, real: Tensor) -> Tensor:
        """The same as a figure, from what :meth:`gather` has just summed by cluster: nothing is gathered per token."""
        now, mu = self._latest, self.centroids.float()
        if now is None:
            raise RuntimeError("nothing was gathered")
        squares = sum((torch.linalg.vector_norm(x, dim=-1).square() * real[:, None]).sum() for x in (query, key))
        total = squares - 2 * (mu * now.sums).sum() + (now.counts * mu.square().sum(-1)).sum()
        count = real.sum() * (query.shape[1] + key.shape[1]) * query.shape[-1]
        mean: Tensor = total / count.clamp(min=1)
        return mean.to(query.dtype)

    def expired_keys(self, noted: Any = None) -> Tensor | None:
        seen = self._seen if noted is None else noted
        if seen is None:
            return None
        clusters, sequences, slots = seen
        if slots is not None:  # what is gone is in no cluster
            whole = clusters.new_full((*clusters.shape[:2], sequences.key_length), self.num_clusters)
            clusters = whole.index_copy(2, slots.to(clusters.device), clusters)
        rows = [s.row for s in sequences.spans]
        if len(set(rows)) != len(rows):
            return None
        position, length = key_places(sequences, clusters.device)
        window = self.config.cluster_window(sequences.key_length, causal=True)
        dead = expired(clusters.masked_fill((position < 0)[:, None], self.num_clusters), window).all(1)
        if self.local is not None:
            dead = dead & (length - position >= self.config.local_window)
        return dead | (position < 0)

    @torch.no_grad()
    def note_clusters(self, inputs: AttentionInputs) -> None:
        """Find the clusters of a call for :meth:`figures`, where its forward did not: bidirectional, in eval mode."""
        routed = self._heads(inputs, slice(self.config.num_local_heads, None))
        if self._cluster_sizes() is None:
            self._observe(self._vectors(routed), routed.sequences)

    def figures(self) -> dict[str, float]:
        return self.cluster_figures()


@lru_cache(maxsize=256)
def _warn_if_dearer_than_dense(config: RoutingAttentionConfig, length: int, window: int) -> None:
    """Once per config and length."""
    pairs = config.num_clusters * window * window
    if pairs > length * length:
        best = max(1, -(-length // config.num_clusters))
        warnings.warn(
            f"routing with num_clusters={config.num_clusters} and a window of {window} computes {pairs} pairs at "
            f"length {length}, dense attention {length * length}; use window=None ({best} here) or fewer clusters",
            stacklevel=2,
        )
