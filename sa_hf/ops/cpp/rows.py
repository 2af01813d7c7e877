"""The tensors that a call of the kernels reads where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.lanes import Lanes, Places, Slots
from sa_hf.ops.parts import Index, ScoreOptions

LOG2E = 1.4426950408889634
# By their numbers in call.h.
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, eq=False)
class Rows:
    """The tensors of a call in one dtype of ``ELEMENTS``, and what its options say of each row.

    query ``[B, H, Nq, D]``, key and value ``[B, Hkv, Nk, D]``; ``fields``: the call's tensors for its options, by name;
    ``span_at``: int64 ``[lanes, Nk]``, where each key's span lies in the flat spans, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: ScoreOptions
    fields: dict[str, Tensor]
    span_at: Tensor | None

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, query_index: Index = None,
        key_index: Index = None,
    ) -> Rows:  # fmt: skip
        """Args: query_index, key_index: the positions of the rows, where they stand in slots."""
        lanes = Lanes.of(query, key)
        places, fields, span_at = Places.of(options, lanes, query_index, key_index), {}, None
        if options.distance_bias is not None:
            fields["bias"] = options.distance_bias.float() * LOG2E
        for name, term in zip(("query", "key"), options.terms, strict=True):
            if term is not None:
                fields[f"{name}_term"], fields[f"{name}_buckets"] = term.values.float(), term.buckets.int()
        if options.spans is not None:
            span_at = places.span_at(lanes.ids, _positions(places.key_at, lanes, key.shape[2]))
            fields["spans"] = options.spans.float().flatten()[span_at]
        if options.dropout > 0:
            for name, at, x, stream in (
                ("row_word", places.query_at, query, 0), ("column_word", places.key_at, key, 1)
            ):  # fmt: skip
                fields[name] = places.dropout_words(lanes.ids, _positions(at, lanes, x.shape[2]), stream)
        same = query.dtype == key.dtype == value.dtype and query.dtype in ELEMENTS
        dtype = query.dtype if same else torch.float32
        query, key, value = (plain(x, dtype) for x in (query, key, value))
        _check_shapes(query, key, value)
        return cls(query, key, value, options, {name: x.contiguous() for name, x in fields.items()}, span_at)

    @property
    def lanes(self) -> int:
        return self.query.shape[0] * self.query.shape[1]


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, each row's elements next to each other."""
    x = x.detach().to(dtype)
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """The kernels trust what they are given: a shape that does not fit would be read out of bounds."""
    batch, heads, _, head_dim = query.shape
    fits = key.shape == value.shape and key.shape[0] == batch and key.shape[3] == head_dim
    if not fits or key.shape[1] == 0 or heads % key.shape[1] != 0:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape, batch {batch}, head_dim "
            f"{head_dim} and a number of heads that divides {heads}, as query {tuple(query.shape)} has"
        )


def _positions(at: Slots, lanes: Lanes, rows: int) -> Tensor:
    """int64 ``[lanes, rows]``"""
    return at.positions(lanes.ids, torch.arange(rows, device=lanes.device)[None]).expand(lanes.count, rows)
