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
        call.key.data, call.value.data = key.data_ptr(), value.data_ptr()
        call.held = key.shape[2] if keys is None else keys
        slots = None if kept is None else kept.to(torch.int64).contiguous()
        call.kept = None if slots is None else slots.data_ptr()
        if library().sa_hf_decode(ctypes.byref(call)):
            raise missing_key()
        return out if rows is query else out.to(query.dtype)


def layout_of(*tensors: Tensor) -> tuple[object, ...]:
    """What a prepared step takes for granted: all but the number of keys and where they lie."""
    query = tensors[0]
    return query.dtype, query.shape, *((x.dtype, x.shape[1], x.shape[3], x.stride()) for x in tensors)


def prepared(
    query: Tensor, key: Tensor, value: Tensor, reads: Reads, options: ScoreOptions, *, listed: Listed | None = None,
    labelled: Labelled | None = None,
) -> PreparedStep:  # fmt: skip
    """A step of queries, keys and values like these; the arguments of :func:`decode_step`."""
    layout = layout_of(query, key, value)
    _, heads, n_q, head_dim = query.shape
    kv_heads, held = key.shape[1:3]
    group, value_dim = heads // kv_heads, value.shape[3]
    own_lists = [reads.list_heads, 1 if listed is None else listed.index.shape[1]]
    apart = labelled is not None or (options.spans is not None and options.spans.shape[1] > 1)
    lanes = heads if group > 1 and (apart or heads in own_lists) else kv_heads
    rows = query if query.dtype == torch.float32 and query.stride(3) == 1 else plain(query, torch.float32)
    key, value = last_together(key), last_together(value)
    out = CallRows(0, n_q * heads * value_dim, value_dim, heads * value_dim)  # [B, Nq, H, Dv]
    call = DecodeCall(
        query=CallRows.of(rows), key=CallRows.of(key), value=CallRows.of(value), out=out,
        rows=reads.rows.buffer_info()[0], run_start=reads.lists.starts.buffer_info()[0],
        runs=reads.lists.runs.buffer_info()[0], num_rows=reads.count, heads=heads, kv_heads=kv_heads, lanes=lanes,
        list_heads=reads.list_heads, queries=n_q, head_dim=head_dim, value_dim=value_dim, held=held,
        relative=reads.relative, skip_own=reads.skip_own, own_if_empty=reads.own_if_empty, element=ELEMENTS[key.dtype],
        threads=torch.get_num_threads(), scale=options.scale, softcap=options.softcap or 0.0, ramp=options.ramp,
    )  # fmt: skip
    held_tensors: list[Tensor] = []
    if reads.order is not None:
        held_tensors.append(_set(call, "order", reads.order, torch.int64))
        call.order_width = reads.order.shape[1]
    if options.distance_bias is not None:
        held_tensors.append(_set(call, "bias", options.distance_bias, torch.float32))
        call.bias_columns = options.distance_bias.shape[1]
    if options.sinks is not None:
        held_tensors.append(_set(call, "sinks", options.sinks, torch.float32))
    if options.spans is not None:
        spans = options.spans.detach().float()
        spans = spans if spans.stride(2) == 1 else spans.contiguous()
        call.spans, call.span_batch_step, call.span_head_step = spans.data_ptr(), *_steps(spans)
        held_tensors.append(spans)
    if listed is not None:
        held_tensors.append(_set(call, "index", listed.index, torch.int64))
        call.index_batch, call.index_heads, _, call.index_width = listed.index.shape
        call.unit = listed.unit
    if labelled is not None:
        labels = labelled.keys if labelled.keys.stride(2) == 1 else labelled.keys.contiguous()
        call.labels, call.label_batch_step, call.label_head_step = labels.data_ptr(), *labels.stride()[:2]
        held_tensors += [labels, _set(call, "row_label", labelled.rows, torch.int64)]
        call.most = labelled.most
    return PreparedStep(call, tuple(held_tensors), reads, layout)


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
