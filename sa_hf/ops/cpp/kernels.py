"""Parts through the kernels in C++: with every score option, forward and backward.

A part's rows are read and written where they lie: nothing is gathered, and parts are merged as they are written.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.cpp.build import BuildError, load
from sa_hf.ops.cpp.call import DTYPES, FAR, Call, CallIndex, CallRows, ChoiceCall, ClusterCall, DecodeCall
from sa_hf.ops.cpp.rows import ELEMENTS, Rows, plain
from sa_hf.ops.cpp.sources import FILES
from sa_hf.ops.engine import Gradients
from sa_hf.ops.memory import large_empty, large_zeros
from sa_hf.ops.parts import UNBOUNDED, Band, BlockLayout, BlockPart, Index, OffsetsPart, Part, ScoreOptions
from sa_hf.ops.random import dropout_threshold

logger = logging.getLogger(__name__)

SWITCH = "SA_HF_CPU_KERNELS"
UNITS_SWITCH = "SA_HF_CPU_UNITS"
# By their numbers in units.h, the best first: the matrix unit, dot products of pairs, fp32 of what is widened.
UNITS = {"amx": 2, "avx512_bf16": 1, "none": 0}
TILE = 64  # as in the sources
# Gradients of keys and values are summed by one thread for each key lane, in pieces where there are too few lanes for
# the threads: up to so many, or twice the query heads of a key head. A piece costs a copy of both gradients.
MOST_PIECES = 4


def library() -> ctypes.CDLL:
    """The compiled kernels, built at the first call.

    Raises:
        SparseAttentionError: :func:`why_not` has a reason.
    """
    found, reason = _found()
    if found is None:
        raise SparseAttentionError(f"there are no compiled kernels: {reason}; use engine='torch'")
    return found


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
    found.sa_hf_forward.argtypes = [ctypes.POINTER(Call)]
    found.sa_hf_backward.argtypes = [ctypes.POINTER(Call), ctypes.c_int64]
    found.sa_hf_forward.restype = found.sa_hf_backward.restype = None
    found.sa_hf_decode.argtypes, found.sa_hf_decode.restype = [ctypes.POINTER(DecodeCall)], ctypes.c_int
    found.sa_hf_choose.argtypes, found.sa_hf_choose.restype = [ctypes.POINTER(ChoiceCall)], None
    found.sa_hf_nearest.argtypes, found.sa_hf_nearest.restype = [ctypes.POINTER(ClusterCall)], None
    found.sa_hf_units.argtypes, found.sa_hf_units.restype = [], ctypes.c_int64
    return found, None


@cache
def units() -> str:
    """What multiplies bfloat16 here, of ``UNITS``: the best that there is, or what ``SA_HF_CPU_UNITS`` names.

    Raises:
        SparseAttentionError: the variable names what this machine does not have.
    """
    found = library().sa_hf_units()
    there = [name for name, number in UNITS.items() if number & found or not number]
    chosen = os.environ.get(UNITS_SWITCH) or there[0]
    if chosen not in there:
        raise SparseAttentionError(f"{UNITS_SWITCH}={chosen!r} must be one of {there} here; nearest: {there[0]!r}")
    return chosen


def forward(part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> tuple[Tensor, Tensor]:
    """As ``Engine.forward``: rows in the part's slots."""
    rows = Rows.of(query, key, value, options, part.query_index, part.key_index)
    out = large_empty(*query.shape, dtype=rows.query.dtype)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    _PartCall(part, rows, in_place=False).forward(out, lse, merge=False)
    return out.to(query.dtype), lse


def backward(
    part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    grad_out: Tensor, options: ScoreOptions,
) -> Gradients:  # fmt: skip
    """As ``Engine.backward``: rows in the part's slots."""
    rows = Rows.of(query, key, value, options, part.query_index, part.key_index)
    grads = _backward([part], rows, out, lse, grad_out, in_place=False)
    return replace(
        grads, query=grads.query.to(query.dtype), key=grads.key.to(key.dtype), value=grads.value.to(value.dtype)
    )


def forward_all(parts: Sequence[Part], rows: Rows, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The parts of a plan merged: output ``[B, H, Nq, D]`` and log-sum-exp ``[B, H, Nq]`` fp32, in positions.

    The output is in fp32, or in the rows' dtype where one part is all that there is: a running result rounded once per
    part would add up errors.

    Args:
        rows: in positions.
        start: what came before the parts; fp32 and contiguous tensors are written to.
    """
    shape, fresh = rows.query.shape, False
    if start is None:
        fresh = parts[0].query_index is None and _shape(parts[0])[0] == shape[2]  # every position in a slot
        dtype = rows.query.dtype if len(parts) == 1 else torch.float32
        by_position = shape[0], shape[2], shape[1], shape[3]  # in memory: see ``ops.run.laid_out``
        start = (
            (large_empty if fresh else large_zeros)(*by_position, dtype=dtype).transpose(1, 2),
            torch.full(shape[:3], -torch.inf, dtype=torch.float32),
        )
    else:
        start = start[0].float().contiguous(), start[1].float().contiguous()
    for number, part in enumerate(parts):
        _PartCall(part, rows, in_place=True).forward(*start, merge=number > 0 or not fresh)
    return start


def backward_all(parts: Sequence[Part], rows: Rows, out: Tensor, lse: Tensor, grad_out: Tensor) -> Gradients:
    """The sum of the parts' gradients, in the rows' dtype or in fp32; ``out`` and ``lse`` are the whole plan's."""
    return _backward(parts, rows, out, lse, grad_out, in_place=True)


def _backward(
    parts: Sequence[Part], rows: Rows, out: Tensor, lse: Tensor, grad_out: Tensor, *, in_place: bool
) -> Gradients:  # fmt: skip
    parts = [part for part in parts if _shape(part)[0] > 0 and rows.lanes > 0]
    if not parts:
        return Gradients(*(torch.zeros_like(x) for x in (rows.query, rows.key, rows.value)))
    out, grad_out = (plain(x, rows.query.dtype) for x in (out, grad_out))
    lse, sums = lse.float().contiguous(), Sums.zeros(rows, len(parts))
    calls = [_PartCall(part, rows, in_place=in_place) for part in parts]
    for call in calls:
        call.backward_from(out, lse, grad_out, sums)
    # Threads that share a lane go through it part by part: parts add to the same queries.
    for some in [calls] if sums.pieces == 1 else [[call] for call in calls]:
        library().sa_hf_backward((Call * len(some))(*(call.call for call in some)), len(some))
    return sums.gradients(rows)


@dataclass(frozen=True, eq=False)
class Sums:
    """Where gradients go, and where they add up.

    ``query [B, H, Nq, D]``, key and value ``[pieces, B, Hkv, Nk, padded]`` (head_dim padded to whole vectors) in fp32,
    zeros at first. Of 16-bit rows, query is in their dtype where it has one part, and where each key lane is a single
    piece all three are, key and value ``[B, Hkv, Nk, D]``: fp32 sums are then kept for the lanes that threads are at,
    ``query_sums [threads, Nq, D]`` and ``key_sums [2, threads, Nk, padded]``.
    Bias is ``[pieces, lanes, columns]`` and spans ``[pieces, lanes, Nk]``; the terms' values ``[B, H, Nq, R]`` (each
    query is in one piece) and ``[pieces, B, H, Nk, R]``.
    """

    pieces: int
    query: Tensor
    key: Tensor
    value: Tensor
    query_sums: Tensor | None
    key_sums: Tensor | None
    bias: Tensor | None
    spans: Tensor | None
    query_term: Tensor | None
    key_term: Tensor | None

    @classmethod
    def zeros(cls, rows: Rows, parts: int) -> Sums:
        query, key = rows.query, rows.key
        bias, spans, _, query_term, key_term = rows.options.learned
        threads, key_lanes = torch.get_num_threads(), key.shape[0] * key.shape[1]
        pieces = _pieces(key_lanes, query.shape[1] // key.shape[1], threads)
        padded, at_work = _padded(key.shape[3]), min(threads, key_lanes)
        by_lane = query.dtype != torch.float32 and pieces == 1
        of_keys = (pieces, *key.shape[:3], padded)
        if by_lane and parts > 1:
            of_query = large_empty(*query.shape, dtype=query.dtype)
        else:
            of_query = large_zeros(*query.shape, dtype=query.dtype if parts == 1 else torch.float32)
        return cls(
            pieces, of_query,
            large_empty(*key.shape, dtype=key.dtype) if by_lane else large_zeros(*of_keys),
            large_empty(*key.shape, dtype=key.dtype) if by_lane else large_zeros(*of_keys),
            large_empty(at_work, *query.shape[2:]) if by_lane and parts > 1 else None,
            large_empty(2, at_work, key.shape[2], padded) if by_lane else None,
            None if bias is None else large_zeros(pieces, rows.lanes, bias.shape[1]),
            None if spans is None else large_zeros(pieces, rows.lanes, key.shape[2]),
            None if query_term is None else large_zeros(*query_term.shape),
            None if key_term is None else large_zeros(pieces, *key_term.shape),
        )  # fmt: skip

    def gradients(self, rows: Rows) -> Gradients:
        """In fp32 or the rows' dtype, those of the options in their own."""
        bias, spans, d = rows.options.distance_bias, rows.options.spans, rows.key.shape[3]
        grad_bias = grad_spans = None
        if bias is not None and self.bias is not None:
            grad_bias = self.bias.sum(0).view(-1, *bias.shape).sum(0).to(bias.dtype)
        if spans is not None and self.spans is not None and rows.span_at is not None:
            flat = self.spans.new_zeros(spans.numel())
            flat.scatter_add_(0, rows.span_at.flatten(), self.spans.sum(0).flatten())
            grad_spans = flat.view(spans.shape).to(spans.dtype)
        key, value = self.key, self.value
        if self.key_sums is None:
            key, value = (_summed(x)[..., :d] for x in (key, value))
        of_terms = self.query_term, None if self.key_term is None else _summed(self.key_term)
        terms = (
            None if x is None or term is None else x.to(term.values.dtype)
            for x, term in zip(of_terms, rows.options.terms, strict=True)
        )
        return Gradients(self.query, key, value, grad_bias, grad_spans, None, *terms)


def _summed(pieces: Tensor) -> Tensor:
    return pieces[0] if len(pieces) == 1 else pieces.sum(0)


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

    def __init__(self, part: Part, rows: Rows, *, in_place: bool) -> None:
        options, query, key = rows.options, rows.query, rows.key
        self.held: list[Tensor] = []
        query_slots, key_slots, band = _shape(part)
        self.call = Call(
            in_place=in_place, element=ELEMENTS[query.dtype], units=UNITS[units()],
            batch=query.shape[0], heads=query.shape[1], kv_heads=key.shape[1],
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
        if options.query_term is not None:
            self.call.term_queries, self.call.query_width = options.query_term.values.shape[2:]
            self.call.query_distances = len(options.query_term.buckets)
        if options.key_term is not None:
            self.call.term_keys, self.call.key_width = options.key_term.values.shape[2:]
            self.call.key_distances = len(options.key_term.buckets)
        if options.dropout > 0:
            self.call.dropout_threshold = dropout_threshold(options.dropout)
        self._tensors(**rows.fields)
        self._rows(query=query, key=key, value=rows.value)

    def forward(self, out: Tensor, lse: Tensor, *, merge: bool) -> None:
        self._rows(out=out)
        self._tensors(lse=lse)
        self.call.merge, self.call.narrow = merge, out.dtype != torch.float32
        if self.call.query_slots > 0 and self.call.batch > 0:
            library().sa_hf_forward(ctypes.byref(self.call))

    def backward_from(self, out: Tensor, lse: Tensor, grad_out: Tensor, sums: Sums) -> None:
        self._rows(out=out, grad_out=grad_out, grad_query=sums.query)
        self._tensors(lse=lse, query_sums=sums.query_sums, grad_bias=sums.bias, grad_spans=sums.spans)
        self._tensors(grad_query_term=sums.query_term, grad_key_term=sums.key_term)
        self.call.pieces, self.call.narrow = sums.pieces, sums.query.dtype != torch.float32
        if sums.key_sums is None:
            self._tensors(key_sums=sums.key, value_sums=sums.value)
        else:
            self._rows(grad_keys=sums.key, grad_values=sums.value)
            self._tensors(key_sums=sums.key_sums[0], value_sums=sums.key_sums[1])

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


def _pieces(key_lanes: int, group: int, threads: int) -> int:
    if key_lanes % threads == 0 or key_lanes >= 2 * threads:
        return 1
    return min(max(MOST_PIECES, 2 * group), -(-2 * threads // key_lanes))


def _padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16


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
