"""What a pattern is told of: the shape that a plan is made for, the layer that it serves, one call of that layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_hf.ops.cpp.steps import PreparedStep
from sa_hf.ops.parts import Band, DistanceTerm
from sa_hf.ops.sequences import Sequences

DEFAULT_BLOCK = 64


@dataclass(frozen=True)
class Geometry:
    """The shape that a plan is made for: one sequence of ``key_length`` positions, its last ``query_length`` queries.

    Args:
        heads: the model's own query-head indices that this plan serves, in order.
        num_heads: query heads of the whole layer.
        layer_idx: the layer's place in its stack.
        band: the model's own window, intersected with the pattern; ``right=0`` where causal.
        chunk: the model's own chunks of this many tokens, likewise: pairs of two chunks are left out; None: none.
        block: tile size of the block lists.
    """

    key_length: int
    query_length: int
    heads: tuple[int, ...] = (0,)
    num_heads: int = 1
    layer_idx: int = 0
    causal: bool = False
    band: Band = Band()
    block: int = DEFAULT_BLOCK
    chunk: int | None = None

    @property
    def query_offset(self) -> int:
        return self.key_length - self.query_length

    @property
    def full_band(self) -> Band:
        """The model's window and causality together."""
        return self.band.causal_if(self.causal)

    def reached(self, i: Tensor, j: Tensor) -> Tensor:
        """The pairs of positions inside the model's window, causality and chunks, bool."""
        kept = self.full_band.contains(i, j)
        return kept if self.chunk is None else kept & self.same_chunk(i, j)

    def same_chunk(self, i: Tensor, j: Tensor) -> Tensor:
        assert self.chunk is not None
        return i // self.chunk == j // self.chunk

    def readable(self, position: int) -> Tensor:
        """Which positions ``j < position`` the model's own window and chunk still let a query at ``position`` read,
        bool."""
        j = torch.arange(position)
        kept = torch.ones_like(j, dtype=torch.bool) if self.band.left is None else position - j <= self.band.left
        return kept if self.chunk is None else kept & (j >= position // self.chunk * self.chunk)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Positions that read each other, forward too, beside what the pattern lets them read: those of one image.

    ``ids [batch, slots]`` int64 number each slot's block, -1 is none; ``band`` is the window that holds for them.
    """

    ids: Tensor
    band: Band = Band()


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer of a model, as far as a pattern needs to know it.

    Args:
        num_heads: query heads of the whole layer.
        num_key_value_heads: key heads that the pattern is given: the whole layer's, or those of its part.
        head_dim: of queries and keys.
        max_length: the longest input the model takes; None where unbounded.
        band: the model's own sliding window; chunk: the tokens of its own chunks (Llama 4), beyond which nothing is
            read.
        heads: the query heads that a part of a mixture serves; None is all.
        whole_groups: the part has all query heads of each of its key heads (grouped-query attention).
        sinks: each head has a logit in the softmax's denominator.
        terms: its scores have terms of each query or key with the distance (``DistanceTerm``).
    """

    layer_idx: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    causal: bool
    max_length: int | None = None
    band: Band = Band()
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    heads: tuple[int, ...] | None = None
    whole_groups: bool = True
    sinks: bool = False
    chunk: int | None = None
    terms: bool = False


@dataclass(eq=False)
class AttentionInputs:
    """One call of an attention layer.

    Args:
        query: ``[B, H, Nq, D]``.
        key, value: ``[B, Hkv, Nk, D]`` (after rotary embedding, cache included); values may be of another width.
        hidden_states: ``[B, Nq, hidden]``, the layer's input.
        distance_bias, sinks: ``[H, 2 * N - 1]`` and ``[H]``; query_term, key_term: of all slots of the queries, and of
            the keys; as in ``ScoreOptions``.
        before_rotary: ``(query, key)`` gives queries and keys of the new tokens as they were before the rotary
            embedding; None where there is none. ``turned_halves()`` gives the angles ``(cos, sin)`` ``[B, N, R]`` where
            that has turned the halves of their first R dimensions against each other, else None.
        remember: ``(name, tensor, dim)`` joins a per-token tensor of the new positions to the cached ones along ``dim``
            and returns that of all key positions. With ``need=m`` the cache keeps the last m (and a few) alone, and
            only these and the new ones come back; with ``whole=False`` those of the keys that a cache kept
            (``key_slots``), else the others' places are filled. None without a cache (then ``Nq == Nk``).
        beside: ``(name)`` gives what an earlier call on the same cache has put there by ``beside(name, tensor)``,
            ``[B, C, m, D]`` made of the keys; it follows the rows of the batch, and after a crop it is empty. None
            without a cache, too.
        key_slots: ``[Nk]``, the slots of the keys, ascending, where a cache has dropped others and the pattern
            ``reads_listed_keys``; None: key ``j`` stands at slot ``j``.
        band, chunk: the model's own window and chunks, as in ``Geometry``.
        blocks: over all key slots of this call; None where there are none.
        step: set by a pattern whose call was a step of decoding in C++: layers alike may run it, too.
        noted: with a cache, what patterns keep of this call to say which keys it may drop (:meth:`note`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sequences: Sequences
    causal: bool
    scale: float
    band: Band = Band()
    softcap: float | None = None
    distance_bias: Tensor | None = None
    dropout: float = 0.0
    engine: str = "auto"
    hidden_states: Tensor | None = None
    before_rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    turned_halves: Callable[[], tuple[Tensor, Tensor] | None] | None = None
    remember: Callable[..., Tensor] | None = None
    beside: Callable[..., Tensor | None] | None = None
    key_slots: Tensor | None = None
    sinks: Tensor | None = None
    chunk: int | None = None
    blocks: Blocks | None = None
    step: PreparedStep | None = None
    noted: dict[int, Any] | None = None
    query_term: DistanceTerm | None = None
    key_term: DistanceTerm | None = None

    def note(self, module: object, what: Any) -> None:
        """Keep what :meth:`SparseAttention.expired_keys` of a module is to know of this call: the module itself may be
        run by several threads."""
        if self.noted is not None:
            self.noted[id(module)] = what

    def remembered(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        """A per-token tensor of the keys that there are, the new ones' joined to the cached ones'."""
        if self.remember is None:
            return tensor
        if self.key_slots is None:
            return self.remember(name, tensor, dim)
        return self.remember(name, tensor, dim, whole=False)
