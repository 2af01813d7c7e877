"""Plans that depend on data: the sequences of a batch group by group, differentiable from outside.

``ops.attend`` makes one plan per shape. Where the plan depends on the tokens (spans, clusters) or the attention is not
one softmax (the mean over clusters, a learned gate), a pattern works on each group of equal sequences itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.attend import Batch
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences of equal shape, stacked: query ``[G, H, nq, D]``, key and value ``[G, Hkv, nk, D]``, no padding.

    ``options`` are those of the group (its sequence numbers, its spans, the middle of the distance table).
    ``queries`` and ``keys`` bring another per-token tensor ``[B, C, N, E]`` of the batch to the group.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: ScoreOptions
    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]

    @property
    def query_offset(self) -> int:
        return self.key.shape[2] - self.query.shape[2]


def map_groups(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, options: ScoreOptions,
    attend: Callable[[Group], Tensor],
) -> Tensor:  # fmt: skip
    """Run ``attend`` on each group of equal sequences; returns ``[B, H, Nq, Dv]`` of values as wide, rows of padding 0.

    Raises:
        SparseAttentionError: the batch carries extra tokens, which belong to patterns that say what reads them.
    """
    if sequences.extra_tokens:
        raise SparseAttentionError(
            f"the model carries {sequences.extra_tokens} extra tokens; a learned pattern does not say who reads them. "
            "Use patterns without extra tokens beside it"
        )
    batch = Batch(sequences, lambda *_: (), options, query.device)
    if sequences.is_full:
        return attend(Group(query, key, value, batch.whole_options, _unchanged, _unchanged))
    compact_query, compact_key, compact_value = batch.compact(query, key, value)
    out = compact_query.new_zeros(*query.shape[:3], value.shape[3])
    for _, rows in batch.groups():
        group = Group(
            rows.queries(compact_query), rows.keys(compact_key), rows.keys(compact_value), rows.options,
            lambda x, rows=rows: rows.queries(batch.compact_queries(x)),  # type: ignore[misc]
            lambda x, rows=rows: rows.keys(batch.compact_keys(x)),  # type: ignore[misc]
        )  # fmt: skip
        rows.write_queries(out, attend(group))
    if not sequences.groups:  # padding alone has gradients, too: 0
        everything = torch.ones((), dtype=torch.bool, device=out.device)
        out = sum((x.masked_fill(everything, 0).sum() for x in (query, key, value)), start=out)
    return batch.expand_queries(out)


def whole_group(query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Group:
    """A batch whose sequences all fill their rows; ``options`` as they stand."""
    return Group(query, key, value, options, _unchanged, _unchanged)


def _unchanged(x: Tensor) -> Tensor:
    return x


def real_queries(sequences: Sequences, device: torch.device) -> Tensor:
    """Which query slots hold a token, bool ``[B, Nq]``."""
    if sequences.is_full:  # no copy from the host, so that a decoding step can be captured
        return torch.ones(sequences.batch_size, sequences.query_length, dtype=torch.bool, device=device)
    real = torch.zeros(sequences.batch_size, sequences.query_length, dtype=torch.bool)
    for s in sequences.spans:
        real[s.row, s.query_start : s.query_start + s.query_length] = True
    if sequences.query_gather is not None:
        real = torch.zeros_like(real).scatter(1, sequences.query_gather.cpu(), real)
    return real.to(device)


def key_places(sequences: Sequences, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each key slot its position in its sequence (-1: padding) and that sequence's length, int64 ``[B, Nk]``."""
    position = torch.full((sequences.batch_size, sequences.key_length), -1)
    length = torch.zeros_like(position)
    for s in sequences.spans:
        slots = slice(s.key_start, s.key_start + s.key_length)
        position[s.row, slots] = torch.arange(s.key_length)
        length[s.row, slots] = s.key_length
    if sequences.key_gather is not None:
        gather = sequences.key_gather.cpu()
        position, length = (torch.zeros_like(x).scatter(1, gather, x) for x in (position, length))
    return position.to(device), length.to(device)
