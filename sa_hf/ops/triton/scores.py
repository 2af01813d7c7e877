"""Host side of the score's options: what the kernels are handed beside the tensors of a part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sa_hf.ops.parts import Index, ScoreOptions
from sa_hf.ops.random import counter_words, dropout_threshold, dropout_words
from sa_hf.ops.slots import made_of, may_be_empty
from sa_hf.ops.triton.launch import packed, padded_rows

LOG2_OF_E = 1.4426950408889634


@dataclass(frozen=True, eq=False)
class SlotPositions:
    """Positions of a part's slots: ``slot + base``, or int32 ``index [B_i, H_i, padded slots]`` with -1 for an empty
    slot and for the padding (``launch.padded_rows``)."""

    index: Tensor | None
    base: int

    @classmethod
    def of(cls, index: Index, offset: int) -> SlotPositions:
        if index is None:
            return cls(None, offset)
        if isinstance(index, slice):
            return cls(None, index.start + offset)
        return cls(made_of(index, f"int32 {offset}", lambda: _int32(index, offset)), 0)

    @property
    def strides(self) -> tuple[int, int]:
        """Of the batch and of the head in units of 8, 0 where shared."""
        return (0, 0) if self.index is None else _row_strides(self.index)

    def tensor(self, slots: int, device: torch.device) -> Tensor:
        """int64 ``[B_i | 1, H_i | 1, slots]``; empty slots -1."""
        if self.index is not None:
            return self.index[..., :slots].long()
        return torch.arange(self.base, self.base + slots, device=device)[None, None]


NO_POSITIONS = SlotPositions(None, 0)


class ScoreNumbers(NamedTuple):
    """Kernel arguments by name: strides of the positions and of the spans, and the options that are numbers."""

    pqb: int
    pqh: int
    pkb: int
    pkh: int
    seb: int
    seh: int
    q_base: int
    k_base: int
    centre: int
    extra: int
    threshold: int
    scale: float
    softcap: float
    inv_ramp: float
    keep_scale: float
    SOFTCAP: bool


def _int32(index: Tensor, offset: int) -> Tensor:
    """``index + offset``, padded; empty slots stay -1."""
    if offset:
        index = torch.where(index >= 0, index + offset, -1) if may_be_empty(index) else index + offset
    return _padded(index.int(), -1)


@dataclass(frozen=True, eq=False)
class Scores:
    """The options of a call in slots: kernel arguments that all kernels of a part share.

    ``bias`` fp32 ``[H, 2N - 1]`` times log2(e); ``spans`` fp32 ``[B, H | 1, key slots]``; ``row_words``,
    ``column_words`` int32 ``[B, H, slots]``; slots are padded.
    """

    options: ScoreOptions
    query: SlotPositions
    key: SlotPositions
    bias: Tensor | None
    spans: Tensor | None
    row_words: Tensor | None
    column_words: Tensor | None

    @classmethod
    def of(cls, options: ScoreOptions, query_index: Index, key_index: Index, query: Tensor, key: Tensor) -> Scores:
        """``query``, ``key``: the part's tensors ``[B, H, slots, D]``."""
        placed = options.distance_bias is not None or options.spans is not None
        # Dropout has the positions in its words, which are made here. Where no score depends on them a kernel has to
        # know empty slots alone: without those it is the plain one, which keeps its registers for larger tiles.
        q_at, k_at = (
            SlotPositions.of(index, offset) if placed or options.dropout > 0 or _has_empty(index) else NO_POSITIONS
            for index, offset in ((query_index, options.query_offset), (key_index, 0))
        )
        bias = None if options.distance_bias is None else (options.distance_bias.float() * LOG2_OF_E).contiguous()
        words: tuple[Tensor, Tensor] | None = None
        if options.dropout > 0:
            words = _words(options, q_at, k_at, query, key)
            if not placed:
                q_at, k_at = (
                    at if _has_empty(index) else NO_POSITIONS for at, index in ((q_at, query_index), (k_at, key_index))
                )
        return cls(
            options, q_at, k_at, bias, _slot_spans(options.spans, k_at, key.shape[2]),
            None if words is None else words[0], None if words is None else words[1],
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the kernels' order."""
        return self.query.index, self.key.index, self.bias, self.spans, self.row_words, self.column_words

    @cached_property
    def numbers(self) -> ScoreNumbers:
        o = self.options
        spans = (0, 0) if self.spans is None else _row_strides(self.spans)
        return ScoreNumbers(
            *self.query.strides, *self.key.strides, *spans, self.query.base, self.key.base,
            centre=0 if self.bias is None else (self.bias.shape[1] + 1) // 2 - 1, extra=o.extra_tokens,
            threshold=2 * dropout_threshold(o.dropout), scale=float(o.scale),
            softcap=1.0 if o.softcap is None else float(o.softcap), inv_ramp=1.0 / float(o.ramp),
            keep_scale=1.0 / (1.0 - o.dropout), SOFTCAP=self.softcapped,
        )  # fmt: skip

    @property
    def demanding(self) -> int:
        """How many options are set that cost a kernel registers."""
        gathered = self.query.index is not None or self.key.index is not None
        return gathered + self.softcapped + sum(x is not None for x in (self.bias, self.spans, self.row_words))

    @property
    def softcapped(self) -> bool:
        return self.options.softcap is not None


def _row_strides(x: Tensor) -> tuple[int, int]:
    """Of a contiguous ``[B, H, padded slots]``, in units of 8 elements; 0 where it is shared."""
    batch, heads, slots = x.shape
    return (heads * slots // 8 if batch > 1 else 0), (slots // 8 if heads > 1 else 0)


def _padded(x: Tensor, value: int = 0) -> Tensor:
    """Contiguous, the last dimension padded so that tiles read it unmasked."""
    more = padded_rows(x.shape[-1]) - x.shape[-1]
    return torch.nn.functional.pad(x, (0, more), value=value).contiguous() if more else packed(x)


def _has_empty(index: Index) -> bool:
    return isinstance(index, Tensor) and may_be_empty(index)


def _slot_spans(spans: Tensor | None, key: SlotPositions, slots: int) -> Tensor | None:
    """``[B, H | 1, Nk]`` over positions to fp32 ``[B, H | 1, padded slots]``."""
    if spans is None:
        return None
    spans = spans.float()
    if key.index is None:
        return _padded(spans[..., key.base : key.base + slots])
    heads = max(spans.shape[1], key.index.shape[1])
    index = key.index.long().clamp(min=0).expand(spans.shape[0], heads, -1)
    return torch.gather(spans.expand(-1, heads, -1), 2, index)


def position_spans(grad: Tensor, key: SlotPositions, like: Tensor) -> Tensor:
    """The adjoint of the gather into slots: ``grad [B, H, slots]`` to the shape of ``like [B, H | 1, Nk]``."""
    result = torch.zeros(like.shape[0], grad.shape[1], like.shape[2], dtype=torch.float32, device=grad.device)
    if key.index is None:
        result[..., key.base : key.base + grad.shape[2]] = grad
    else:
        index = key.index[..., : grad.shape[2]].long().expand(grad.shape)
        result.scatter_add_(2, index.clamp(min=0), grad.masked_fill(index < 0, 0.0))
    return (result.sum(1, keepdim=True) if like.shape[1] == 1 else result).to(like.dtype)


def _words(
    options: ScoreOptions, q_at: SlotPositions, k_at: SlotPositions, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """The dropout words of query rows and of key columns, int32 ``[B, H, padded slots]``."""
    batch, heads, n_q, _ = query.shape
    device = query.device
    seed = options.seed
    if seed is None:
        raise RuntimeError("dropout needs the seed of the call")
    ids = torch.arange(batch, device=device) if options.sequence_ids is None else options.sequence_ids
    head = counter_words(options.heads or tuple(range(heads)), device)

    def words(at: SlotPositions, slots: int, stream: int) -> Tensor:
        word = dropout_words(seed, ids[:, None, None], head[:, None], at.tensor(slots, device), stream=stream)
        return _padded(word.expand(batch, heads, slots))

    return words(q_at, n_q, 0), words(k_at, key.shape[2], 1)
