"""A decoding step by the kernel in C++, which reads keys and values where they lie in a cache."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.cpp.call import CallRows, DecodeCall
from sa_hf.ops.cpp.kernels import library
from sa_hf.ops.cpp.rows import ELEMENTS, plain
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.reads import NOTHING, Reads, Row


@dataclass(frozen=True, eq=False)
class Listed:
    """What a step reads beside its runs: int64 ``index [B | 1, 1 | Hkv | H, Nq, m]``, where an entry x stands for the
    positions ``x * unit .. x * unit + unit - 1`` and -1 for none."""

    index: Tensor
    unit: int = 1


@dataclass(frozen=True, eq=False)
class Labelled:
    """What a step reads beside its runs: each row its own key and the last ``most`` before it with the row's label.
    ``keys`` int64 ``[B, Hkv, Nk]``, of each key; ``rows`` int64 ``[B, H, Nq]``."""

    keys: Tensor
    rows: Tensor
    most: int


def decode_step(
    query: Tensor, key: Tensor, value: Tensor, reads: Reads, options: ScoreOptions, *, kept: Tensor | None = None,
    listed: Listed | None = None, labelled: Labelled | None = None,
) -> Tensor:  # fmt: skip
    """The attention of a step's rows, ``[B, H, Nq, Dv]`` in the query's dtype; rows without a key are 0.

    Args:
        query: ``[B, H, Nq, D]``; key: ``[B, Hkv, Nk, D]``; value: ``[B, Hkv, Nk, Dv]``, all of one dtype of
            ``ELEMENTS``, in any layout of rows.
        options: scale, softcap, distance bias, spans ``[B, H | 1, Nk]`` of the keys that are there, and sinks.
        kept: int64 ``[Nk]`` ascending, the slots of the keys; None: key j stands at slot j.

    Raises:
        SparseAttentionError: a row reads a slot that is not among the ``kept``.
    """
    step = prepared(query, key, value, reads, options, listed=listed, labelled=labelled)
    return step.run(query, key, value, kept).transpose(1, 2)


def decode_listed(query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
    """As ``ops.decode.decode_attention``."""
    length, n_q = key.shape[2], query.shape[2]
    rows = [
        (Row(b, q, 0, 0, length - n_q + q, 0, length), NOTHING) for b in range(query.shape[0]) for q in range(n_q)
    ]  # fmt: skip
    return decode_step(query, key, value, Reads.of(rows, len(rows)), options, listed=Listed(index))


@dataclass(frozen=True, eq=False)
class PreparedStep:
    """A step without its queries, keys and values: those of other layers, alike in shape and layout, may follow."""

    call: DecodeCall
    held: tuple[Tensor, ...]  # what the call points to
    reads: Reads
    layout: tuple[object, ...]

    def serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        return self.layout == layout_of(query, key, value)

    def relisted(self, reads: Reads) -> PreparedStep | None:
        """The same step by other lists; None where it reads anything beside them."""
        if self.call.index or self.call.labels or self.call.spans:
            return None
        if reads is self.reads:
            return self
        call = DecodeCall.from_buffer_copy(self.call)
        held = _list(call, reads, apart=False, listed_heads=1)
        return PreparedStep(call, (*self.held, *held), reads, self.layout)

    def again(
        self, *, spans: Tensor | None = None, listed: Listed | None = None, labelled: Labelled | None = None
    ) -> PreparedStep:
        """The same step with other tensors, of the same shape, of what it reads beside its lists."""
        call = DecodeCall.from_buffer_copy(self.call)
        return PreparedStep(call, (*self.held, *_beside(call, spans, listed, labelled)), self.reads, self.layout)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None = None, keys: int | None = None
    ) -> Tensor:  # fmt: skip
        """The attention of the rows, ``[B, Nq, H, Dv]``; as :func:`decode_step`.

        Args: keys: how many of the keys count, the first; None: all.
        """
        call = self.call
        rows = query if query.dtype == torch.float32 and query.stride(3) == 1 else plain(query, torch.float32)
        key, value = last_together(key), last_together(value)
        made = rows.new_empty if self.reads.complete else rows.new_zeros
        out = made(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        call.query.data, call.out.data = rows.data_ptr(), out.data_ptr()
        call.key, call.value = CallRows.of(key), CallRows.of(value)
        call.held = key.shape[2] if keys is None else keys
        slots = None if kept is None else kept.to(torch.int64).contiguous()
        call.kept = None if slots is None else slots.data_ptr()
        if library().sa_hf_decode(ctypes.byref(call)):
            raise missing_key()
        return out if rows is query else out.to(query.dtype)


def layout_of(*tensors: Tensor) -> tuple[object, ...]:
    """What a prepared step takes for granted: all but the number of keys and how they lie."""
    query = tensors[0]
    return query.shape, query.stride(), *((x.dtype, x.shape[1], x.shape[3]) for x in tensors)


def prepared(
    query: Tensor, key: Tensor, value: Tensor, reads: Reads, options: ScoreOptions, *, listed: Listed | None = None,
    labelled: Labelled | None = None,
) -> PreparedStep:  # fmt: skip
    """A step of queries, keys and values like these; the arguments of :func:`decode_step`."""
    layout = layout_of(query, key, value)
    _, heads, n_q, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    apart = labelled is not None or (options.spans is not None and options.spans.shape[1] > 1)
    rows = query if query.dtype == torch.float32 and query.stride(3) == 1 else plain(query, torch.float32)
    out = CallRows(0, n_q * heads * value_dim, value_dim, heads * value_dim)  # [B, Nq, H, Dv]
    call = DecodeCall(
        query=CallRows.of(rows), out=out, heads=heads, kv_heads=kv_heads, queries=n_q, head_dim=head_dim,
        value_dim=value_dim, element=ELEMENTS[key.dtype], threads=torch.get_num_threads(), scale=options.scale,
        softcap=options.softcap or 0.0, ramp=options.ramp,
    )  # fmt: skip
    held_tensors = _list(call, reads, apart, 1 if listed is None else listed.index.shape[1])
    if options.distance_bias is not None:
        held_tensors.append(_set(call, "bias", options.distance_bias, torch.float32))
        call.bias_columns = options.distance_bias.shape[1]
    if options.sinks is not None:
        held_tensors.append(_set(call, "sinks", options.sinks, torch.float32))
    held_tensors += _beside(call, options.spans, listed, labelled)
    return PreparedStep(call, tuple(held_tensors), reads, layout)


def _beside(call: DecodeCall, spans: Tensor | None, listed: Listed | None, labelled: Labelled | None) -> list[Tensor]:
    """Tell a call what its rows read or weigh beside their lists; returns what the caller holds."""
    held: list[Tensor] = []
    if spans is not None:
        spans = spans.detach().float()
        spans = spans if spans.stride(2) == 1 else spans.contiguous()
        call.spans, call.span_batch_step, call.span_head_step = spans.data_ptr(), *_steps(spans)
        held.append(spans)
    if listed is not None:
        held.append(_set(call, "index", listed.index, torch.int64))
        call.index_batch, call.index_heads, _, call.index_width = listed.index.shape
        call.unit = listed.unit
    if labelled is not None:
        labels = labelled.keys if labelled.keys.stride(2) == 1 else labelled.keys.contiguous()
        call.labels, call.label_batch_step, call.label_head_step = labels.data_ptr(), *labels.stride()[:2]
        held += [labels, _set(call, "row_label", labelled.rows, torch.int64)]
        call.most = labelled.most
    return held


def _list(call: DecodeCall, reads: Reads, apart: bool, listed_heads: int) -> list[Tensor]:
    """Tell a call what its rows read; returns what the caller holds. ``apart``: the query heads of a group read
    differently, whatever the lists say."""
    own_lists = call.heads in (reads.list_heads, listed_heads)
    call.lanes = call.heads if call.heads > call.kv_heads and (apart or own_lists) else call.kv_heads
    call.rows, call.num_rows = reads.rows.buffer_info()[0], reads.count
    call.run_start, call.runs = reads.lists.starts.buffer_info()[0], reads.lists.runs.buffer_info()[0]
    call.list_heads, call.relative = reads.list_heads, reads.relative
    call.skip_own, call.own_if_empty = reads.skip_own, reads.own_if_empty
    if reads.order is None:
        call.order = None
        return []
    call.order_width = reads.order.shape[1]
    return [_set(call, "order", reads.order, torch.int64)]


def missing_key() -> SparseAttentionError:
    return SparseAttentionError(
        "the cache dropped a key that this layer's pattern reads: it was filled under another pattern; start again "
        "from the prompt, with a new cache"
    )


def last_together(x: Tensor) -> Tensor:
    """Each row's elements next to each other."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.detach().contiguous()


def _steps(x: Tensor) -> list[int]:
    """By batch and head, 0 where the head is shared."""
    return [x.stride(0), x.stride(1) if x.shape[1] > 1 else 0]


def _set(call: DecodeCall, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Point a field at a tensor, which the caller holds."""
    x = x.detach().to(dtype).contiguous()
    setattr(call, name, x.data_ptr())
    return x
