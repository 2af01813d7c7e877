"""Parts through the kernels in C++: in fp32, with every score option, forward and backward.

A part's rows are read and written where they lie: nothing is gathered, and parts are merged as they are written.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sa_hf.ops.cpp.build import BuildError, load
from sa_hf.ops.cpp.call import DTYPES, FAR, Call, CallIndex, CallRows, DecodeCall
from sa_hf.ops.cpp.sources import FILES
from sa_hf.ops.engine import Gradients
from sa_hf.ops.lanes import Lanes, Places, Slots
from sa_hf.ops.parts import UNBOUNDED, Band, BlockLayout, BlockPart, Index, OffsetsPart, Part, ScoreOptions
from sa_hf.ops.random import dropout_threshold

logger = logging.getLogger(__name__)

SWITCH = "SA_HF_CPU_KERNELS"
TILE = 64  # as in the sources
LOG2E = 1.4426950408889634
# Gradients of keys and values are summed by one thread for each key lane, in pieces where there are too few lanes for
# the threads: up to so many, or twice the query heads of a key head. A piece costs a copy of both gradients.
MOST_PIECES = 4


def library() -> ctypes.CDLL | None:
    """The compiled kernels, built at the first call; None where :func:`why_not` has a reason."""
    return _found()[0]


def why_not() -> str | None:
    """Why torch's own operators serve instead, or None."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get(SWITCH, "1") == "0":
        return None, f"{SWITCH}=0"
    try:
        headers = tuple((name, text) for name, text in sorted(FILES.items()) if name.endswith(".h"))
        found = load(FILES["kernels.cpp"], "kernels", headers)
    except BuildError as error:
        logger.info("attention on the CPU runs by torch's operators: %s", error)
        return None, str(error)
    for function in (found.sa_hf_forward, found.sa_hf_backward):
        function.argtypes, function.restype = [ctypes.POINTER(Call)], None
    found.sa_hf_decode.argtypes, found.sa_hf_decode.restype = [ctypes.POINTER(DecodeCall)], ctypes.c_int
    return found, None


@dataclass(frozen=True, eq=False)
class Rows:
    """The tensors of a call in fp32, and what its options say of each row.

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
        if options.spans is not None:
            span_at = places.span_at(lanes.ids, _positions(places.key_at, lanes, key.shape[2]))
            fields["spans"] = options.spans.float().flatten()[span_at]
        if options.dropout > 0:
            for name, at, x, stream in (
                ("row_word", places.query_at, query, 0), ("column_word", places.key_at, key, 1)
            ):  # fmt: skip
                fields[name] = places.dropout_words(lanes.ids, _positions(at, lanes, x.shape[2]), stream)
        query, key, value = (plain(x) for x in (query, key, value))
        _check_shapes(query, key, value)
        return cls(query, key, value, options, {name: x.contiguous() for name, x in fields.items()}, span_at)

    @property
    def lanes(self) -> int:
        return self.query.shape[0] * self.query.shape[1]


def forward(part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> tuple[Tensor, Tensor]:
    """As ``Engine.forward``: rows in the part's slots."""
    rows = Rows.of(query, key, value, options, part.query_index, part.key_index)
    out, lse = rows.query.new_empty(query.shape), rows.query.new_empty(query.shape[:3])
    _PartCall(part, rows, in_place=False, merge=False).forward(out, lse)
    return out.to(query.dtype), lse


def backward(
    part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    grad_out: Tensor, options: ScoreOptions,
) -> Gradients:  # fmt: skip
    """As ``Engine.backward``: rows in the part's slots."""
    rows = Rows.of(query, key, value, options, part.query_index, part.key_index)
    sums = Sums.zeros(rows)
    _PartCall(part, rows, in_place=False, merge=False).backward(plain(out), lse, plain(grad_out), sums)
    grads = sums.gradients(rows)
    return replace(
        grads, query=grads.query.to(query.dtype), key=grads.key.to(key.dtype), value=grads.value.to(value.dtype)
    )


def has_every_query(part: Part, length: int) -> bool:
    """Whether a part has all positions below ``length`` as its query slots, in their order."""
    return part.query_index is None and _shape(part)[0] == length


def forward_into(part: Part, rows: Rows, running: tuple[Tensor, Tensor], *, fresh: bool) -> None:
    """Merge a part into the running output ``[B, H, Nq, D]`` and log-sum-exp ``[B, H, Nq]``, contiguous, in positions.

    Args: rows: in positions. fresh: ``running`` is uninitialised, and the part has every query in a slot.
    """
    _PartCall(part, rows, in_place=True, merge=not fresh).forward(*running)


def backward_into(part: Part, rows: Rows, out: Tensor, lse: Tensor, grad_out: Tensor, sums: Sums) -> None:
    """Add a part's gradients to the ``sums``; all in positions, ``out``, ``lse`` and ``grad_out`` the whole plan's."""
    _PartCall(part, rows, in_place=True, merge=False).backward(out, lse, grad_out, sums)


@dataclass(frozen=True, eq=False)
class Sums:
    """Where gradients add up, zeros at first: query ``[B, H, Nq, D]``, key and value ``[pieces, B, Hkv, Nk, padded]``
    (head_dim padded to whole vectors), bias ``[pieces, lanes, columns]`` and spans ``[pieces, lanes, Nk]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    spans: Tensor | None

    @classmethod
    def zeros(cls, rows: Rows) -> Sums:
        key, bias, spans = rows.key, rows.options.distance_bias, rows.options.spans
        pieces = _pieces(
            key.shape[0] * key.shape[1], rows.query.shape[1] // key.shape[1], torch.get_num_threads()
        )  # fmt: skip
        of_keys = (pieces, *key.shape[:3], _padded(key.shape[3]))
        return cls(
            key.new_zeros(rows.query.shape), key.new_zeros(of_keys), key.new_zeros(of_keys),
            None if bias is None else key.new_zeros(pieces, rows.lanes, bias.shape[1]),
            None if spans is None else key.new_zeros(pieces, rows.lanes, key.shape[2]),
        )  # fmt: skip

    def gradients(self, rows: Rows) -> Gradients:
        """In fp32, those of the options in their own dtype."""
        bias, spans, d = rows.options.distance_bias, rows.options.spans, rows.key.shape[3]
        grad_bias = grad_spans = None
        if bias is not None and self.bias is not None:
            grad_bias = self.bias.sum(0).view(-1, *bias.shape).sum(0).to(bias.dtype)
        if spans is not None and self.spans is not None and rows.span_at is not None:
            flat = self.spans.new_zeros(spans.numel())
            flat.scatter_add_(0, rows.span_at.flatten(), self.spans.sum(0).flatten())
            grad_spans = flat.view(spans.shape).to(spans.dtype)
        key, value = ((x[0] if len(x) == 1 else x.sum(0))[..., :d] for x in (self.key, self.value))
        return Gradients(self.query, key, value, grad_bias, grad_spans)


def _shape(part: Part) -> tuple[int, int, Band]:
    """Numbers of query and key slots, and the band."""
    if isinstance(part, OffsetsPart):
        return part.length, part.length, UNBOUNDED
    shape = part.layout if isinstance(part, BlockPart) else part
    return shape.query_slots, shape.key_slots, shape.band


@lru_cache(maxsize=64)
def _offset_lists(offsets: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor, int]:
    """Where each head's begin, int64 ``[heads + 1]``, all of them, and the largest number of a head's."""
    counts = torch.tensor([0, *map(len, offsets)])
    return counts.cumsum(0), torch.tensor([x for own in offsets for x in own], dtype=torch.int64), int(counts.max())


class _PartCall:
    """A part's fields; holds the tensors behind its pointers."""

    def __init__(self, part: Part, rows: Rows, *, in_place: bool, merge: bool) -> None:
        options, query, key = rows.options, rows.query, rows.key
        self.held: list[Tensor] = []
        query_slots, key_slots, band = _shape(part)
        self.call = Call(
            in_place=in_place, merge=merge, batch=query.shape[0], heads=query.shape[1], kv_heads=key.shape[1],
            query_slots=query_slots, key_slots=key_slots, query_rows=query.shape[2],
            key_rows=key.shape[2], head_dim=query.shape[3], padded_dim=_padded(query.shape[3]), pieces=1,
            query_offset=options.query_offset, extra_tokens=options.extra_tokens, threads=torch.get_num_threads(),
            scale=options.scale, softcap=options.softcap or 0.0, ramp=options.ramp, keep=1 - options.dropout,
            left=FAR if band.left is None else band.left, right=FAR if band.right is None else band.right,
        )  # fmt: skip
        if isinstance(part, BlockPart):
            self._blocks(part.layout)
        elif isinstance(part, OffsetsPart):
            start, offsets, most = _offset_lists(part.offsets)
            self._tensors(offset_start=start, offsets=offsets)
            self.call.offset_heads, self.call.most_offsets = len(part.offsets), most
            self.call.begin, self.call.end, self.call.query_segment = part.begin, part.stop, TILE
        else:
            self.call.query_segment, self.call.key_segment = part.query_segment, part.key_segment
            self.call.skip_diagonal = part.skip_diagonal
        self._index("query", part.query_index)
        self._index("key", part.key_index)
        if options.distance_bias is not None:
            self.call.bias_columns = options.distance_bias.shape[1]
        if options.dropout > 0:
            self.call.dropout_threshold = dropout_threshold(options.dropout)
        self._tensors(**rows.fields)
        self._rows(query=query, key=key, value=rows.value)

    def forward(self, out: Tensor, lse: Tensor) -> None:
        self._rows(out=out)
        self._tensors(lse=lse)
        self._run("sa_hf_forward")

    def backward(self, out: Tensor, lse: Tensor, grad_out: Tensor, sums: Sums) -> None:
        self._rows(out=out, grad_out=grad_out, grad_query=sums.query)
        self._tensors(lse=lse, grad_key=sums.key, grad_value=sums.value, grad_bias=sums.bias, grad_spans=sums.spans)
        self.call.pieces = len(sums.key)
        self._run("sa_hf_backward")

    def _run(self, name: str) -> None:
        if self.call.query_slots > 0 and self.call.batch > 0:
            getattr(library(), name)(ctypes.byref(self.call))

    def _tensors(self, **tensors: Tensor | None) -> None:
        for name, x in tensors.items():
            if x is not None:
                if x.dtype != DTYPES[name]:
                    raise TypeError(f"{name} is {x.dtype}, and {DTYPES[name]} is what the kernels read")
                self.held.append(x.contiguous())
                setattr(self.call, name, self.held[-1].data_ptr())

    def _rows(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            self.held.append(x)
            if x.dtype != torch.float32:
                raise TypeError(f"{name} is {x.dtype}, and torch.float32 is what the kernels read")
            setattr(self.call, name, CallRows(x.data_ptr(), *x.stride()[:3]))

    def _index(self, side: str, index: Index) -> None:
        if isinstance(index, slice):
            setattr(self.call, f"{side}_first", index.start)
        elif index is not None:
            index = index.long().contiguous()
            self.held.append(index)
            steps = (step if size > 1 else 0 for step, size in zip(index.stride(), index.shape[:2], strict=False))
            setattr(self.call, f"{side}_index", CallIndex(index.data_ptr(), *steps))

    def _blocks(self, layout: BlockLayout) -> None:
        self.call.list_batch, self.call.list_heads = layout.batch, layout.heads
        self.call.block_q, self.call.block_k = layout.block_q, layout.block_k
        self._tensors(row_start=layout.row_start, columns=layout.columns, kind=layout.kind, masks=_mask_words(layout))
        if layout.key_range is not None:
            self.call.range_batch, self.call.range_heads = layout.key_range.shape[:2]
            self._tensors(key_range=layout.key_range)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """The kernels trust what they are given: a shape that does not fit would be read out of bounds."""
    batch, heads, _, head_dim = query.shape
    fits = key.shape == value.shape and key.shape[0] == batch and key.shape[3] == head_dim
    if not fits or key.shape[1] == 0 or heads % key.shape[1] != 0:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape, batch {batch}, head_dim "
            f"{head_dim} and a number of heads that divides {heads}, as query {tuple(query.shape)} has"
        )


def _pieces(key_lanes: int, group: int, threads: int) -> int:
    if key_lanes % threads == 0 or key_lanes >= 2 * threads:
        return 1
    return min(max(MOST_PIECES, 2 * group), -(-2 * threads // key_lanes))


def _padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16


def plain(x: Tensor) -> Tensor:
    """In fp32, each row's elements next to each other."""
    x = x.detach().float()
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _positions(at: Slots, lanes: Lanes, rows: int) -> Tensor:
    """int64 ``[lanes, rows]``"""
    return at.positions(lanes.ids, torch.arange(rows, device=lanes.device)[None]).expand(lanes.count, rows)


_MASKS: WeakKeyDictionary[BlockLayout, Tensor] = WeakKeyDictionary()


def _mask_words(layout: BlockLayout) -> Tensor | None:
    """The element masks (None where there are none) as int64 ``[P, block_k, ceil(block_q / TILE)]``: bit i of a word is
    query i. Kept while the layout lives."""
    if len(layout.masks) == 0:
        return None
    if layout not in _MASKS:
        masks = layout.masks
        rows = -(-layout.block_q // TILE) * TILE
        padded = torch.nn.functional.pad(masks.view(torch.uint8), (0, 0, 0, rows - layout.block_q))
        weights = (2 ** torch.arange(8)).to(torch.uint8)
        # A byte from 8 queries, a word from 8 bytes (little-endian).
        octets = padded.view(len(masks), rows // TILE, 8, 8, layout.block_k) * weights[:, None]
        octets = octets.sum(3, dtype=torch.uint8).permute(0, 3, 1, 2)
        octets = octets.clone(memory_format=torch.contiguous_format)  # with a size of 1, too
        _MASKS[layout] = octets.view(torch.int64).squeeze(-1)
    return _MASKS[layout]
