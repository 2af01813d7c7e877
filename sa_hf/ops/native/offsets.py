"""Fixed offsets: the keys of one offset are a shifted contiguous slice, so nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.native.lanes import Lanes
from sa_hf.ops.native.masks import words
from sa_hf.ops.native.scores import (
    OptionGradients,
    Pairs,
    ScoreRules,
    pairs_at,
    score_gradient,
    shape_scores,
    softmax_weights,
)
from sa_hf.ops.parts import OffsetsPart

# Elements of one shifted slice, 4 MB in fp32: smaller ones lose more to the number of calls than the cache saves.
SLICE_ELEMENTS = 2**20
LEAST_ROWS = 32


@dataclass(frozen=True, eq=False)
class Chunk:
    """Query rows ``begin .. end`` of the heads that share ``offsets``.

    Tensors are viewed as ``[B, Hkv, group, N, D]``; ``key_head`` and ``member`` choose among the middle two.
    """

    part: OffsetsPart
    lanes: Tensor
    key_head: slice
    member: slice
    offsets: tuple[int, ...]
    begin: int
    end: int

    def rows(self, x: Tensor) -> Tensor:
        return x[:, self.key_head, self.member, self.begin : self.end]

    def runs(self) -> Iterator[tuple[int, slice, slice, slice]]:
        """``(number, query rows, the same rows inside the chunk, key slots)`` of each offset that has any."""
        low, high = self.part.begin, self.part.stop
        for number, offset in enumerate(self.offsets):
            first = max(self.begin, low, low + offset)
            last = min(self.end, high, high + offset)
            if first < last:
                inner = slice(first - self.begin, last - self.begin)
                yield number, slice(first, last), inner, slice(first - offset, last - offset)

    def product(self, x: Tensor, y: Tensor, fill: float) -> Tensor:
        """``(x[i] * y[i - offset]).sum()`` per row and offset, ``[T, rows, offsets]``; ``fill`` where out of range.

        x ``[B, Hkv, group, N, D]``, y ``[B, Hkv, 1, N, D]``. The rows of an offset are contiguous.
        """
        shape = self.rows(x).shape
        result = x.new_full((len(self.offsets), *shape[:4]), fill)
        product = x.new_empty(shape)
        for number, rows, inner, keys in self.runs():
            left, right = x[:, self.key_head, self.member, rows], y[:, self.key_head, :, keys]
            used = torch.mul(left, right, out=product[:, :, :, inner])
            torch.sum(used, -1, out=result[number, :, :, :, inner])
        return result.flatten(1, 3).permute(1, 2, 0)

    def pairs(self, rules: ScoreRules, dtype: torch.dtype) -> Pairs:
        device = self.lanes.device
        i = torch.arange(self.begin, self.end, device=device)[:, None]
        j = i - torch.tensor(self.offsets, dtype=torch.int64, device=device)
        low, high = self.part.begin, self.part.stop
        kept = ((i >= low) & (i < high) & (j >= low) & (j < high))[None]
        j = j.clamp(0, self.part.length - 1)
        if rules.key_filled is not None:
            filled = rules.key_filled[self.lanes]  # fewer than the queries where those of the end have no key
            kept = kept & filled[:, j.clamp(max=filled.shape[1] - 1)]
        if not rules.positional:
            return Pairs(words(kept))
        query = rules.query_at.positions(self.lanes, i[None, :, 0])[:, :, None]
        key = rules.key_at.positions(self.lanes, j.flatten()[None]).view(-1, *j.shape)
        return pairs_at(rules, self.lanes, query, key, words(kept), dtype)


def chunks(part: OffsetsPart, lanes: Lanes, head_dim: int) -> Iterator[Chunk]:
    grid = lanes.ids.view(lanes.batch, lanes.kv_heads, lanes.group)
    everything = slice(None)
    if len(part.offsets) == 1:
        sets = [(grid.flatten(), everything, everything, part.offsets[0])]
    else:
        sets = []
        for head, own in enumerate(part.offsets):
            at, place = divmod(head, lanes.group)
            sets.append((grid[:, at, place], slice(at, at + 1), slice(place, place + 1), own))
    for chosen, key_head, member, offsets in sets:
        if not offsets:
            continue
        step = max(LEAST_ROWS, SLICE_ELEMENTS // (len(chosen) * head_dim))
        for begin in range(0, part.length, step):
            yield Chunk(part, chosen, key_head, member, offsets, begin, min(begin + step, part.length))


def offsets_forward(part: OffsetsPart, rules: ScoreRules, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``q [lanes, N, D]``, ``k, v [key lanes, N, D]`` -> output ``[lanes, N, D]`` and log-sum-exp
    ``[lanes, N]``."""
    lanes = rules.lanes
    queries, keys, values = grouped(q, lanes), grouped(k, lanes), grouped(v, lanes)
    out = torch.empty_like(q)
    lse = q.new_full(q.shape[:2], -torch.inf)
    grouped_out, grouped_lse = grouped(out, lanes), grouped(lse, lanes)
    for chunk in chunks(part, lanes, q.shape[-1]):
        pairs = chunk.pairs(rules, q.dtype)
        product = chunk.product(queries, keys, 0.0).mul_(rules.options.scale)
        scores, _ = shape_scores(rules.options, pairs, product)
        weight, factor, row_lse = softmax_weights(rules.options, pairs, scores)
        weight *= factor
        target = chunk.rows(grouped_lse)
        target.copy_(row_lse.view(target.shape))
        weight = weight.unflatten(0, target.shape[:3])
        written = False
        for number, rows, inner, at in chunk.runs():
            left, right = weight[:, :, :, inner, number, None], values[:, chunk.key_head, :, at]
            sums = grouped_out[:, chunk.key_head, chunk.member, rows]
            if written:
                sums.addcmul_(left, right)
            elif rows == slice(chunk.begin, chunk.end):
                torch.mul(left, right, out=sums)
            else:
                chunk.rows(grouped_out).zero_()
                sums.addcmul_(left, right)
            written = True
    return out, lse


def offsets_backward(
    part: OffsetsPart, rules: ScoreRules, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad: Tensor,
    gathered: OptionGradients,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values; ``lse`` and ``delta [lanes, N]`` are the whole plan's."""
    lanes = rules.lanes
    queries, keys, values = grouped(q, lanes), grouped(k, lanes), grouped(v, lanes)
    upstreams, all_lse, all_delta = grouped(grad, lanes), grouped(lse, lanes), grouped(delta, lanes)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    grad_q, grad_k, grad_v = (grouped(x, lanes) for x in grads)
    for chunk in chunks(part, lanes, q.shape[-1]):
        pairs = chunk.pairs(rules, q.dtype)
        product = chunk.product(queries, keys, 0.0).mul_(rules.options.scale)
        upstream = chunk.product(upstreams, values, 0.0)
        shape = chunk.rows(all_lse).shape
        row_lse, row_delta = (chunk.rows(x).reshape(-1, shape[3]) for x in (all_lse, all_delta))
        shaped = shape_scores(rules.options, pairs, product)
        grad_score, seen = score_gradient(rules.options, pairs, shaped, upstream, row_lse, row_delta, gathered)
        grad_score = grad_score.mul_(rules.options.scale).unflatten(0, shape[:3])
        seen = seen.unflatten(0, shape[:3])
        for number, rows, inner, at in chunk.runs():
            heads = chunk.key_head
            by_score = grad_score[:, :, :, inner, number, None]
            grad_q[:, heads, chunk.member, rows].addcmul_(by_score, keys[:, heads, :, at])
            _add_product(grad_k[:, heads, :, at], by_score, queries[:, heads, chunk.member, rows])
            by_weight = seen[:, :, :, inner, number, None]
            _add_product(grad_v[:, heads, :, at], by_weight, upstreams[:, heads, chunk.member, rows])
    return grads[0], grads[1], grads[2]


def _add_product(target: Tensor, x: Tensor, y: Tensor) -> None:
    """Add ``x * y``, summed over the members of each group, to ``target`` (group size 1)."""
    if y.shape[2] == 1:
        target.addcmul_(x, y)
    else:
        target.add_((x * y).sum(2, keepdim=True))


def grouped(x: Tensor, lanes: Lanes) -> Tensor:
    """``[lanes | key lanes, N, ...]`` as ``[B, Hkv, group | 1, N, ...]``."""
    return x.view(lanes.batch, lanes.kv_heads, -1, *x.shape[1:])
