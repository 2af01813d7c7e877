"""The soft gate of expire-spans beside torch's flash attention op.

A gate that multiplies a probability after the exponential is a score plus its logarithm, which the op takes as a mask.
The logarithm's own gradient is never formed (it is infinite where a gate closes): that of the spans comes from the
probabilities before the gate, on the ramps alone, ``ramp`` pairs of each key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.native.blocks import BlockTiles
from sa_hf.ops.native.masks import additive
from sa_hf.ops.native.scores import ScoreRules
from sa_hf.ops.parts import BlockPart, Part, ScoreOptions

# Torch's logarithm of 0 or of a number near it takes ten times as long as that of others.
LEAST = 1e-30


def serves(part: Part, options: ScoreOptions) -> bool:
    """Whether a part's gates can be made here: key tiles in natural order, and no negative span (there a key's own
    query would stand on a ramp, where the gate is 1 by definition)."""
    natural = isinstance(part, BlockPart) and part.query_index is None and part.key_index is None
    return natural and options.spans is not None and bool((options.spans >= 0).all())


@dataclass(frozen=True, eq=False)
class TileRamps:
    """The ramp ``1 + (e_j - (i - j)) / length`` of a batch of tiles is ``key_side [T, c, block_k] - query_side [T | 1,
    a]``, both counted from a tile's first query, so that distances are rounded and not positions.

    ``span_at [T, c, block_k]``: into the flat spans. ``mask``: additive, as the tiles' scores get it, or None.
    """

    key_side: Tensor
    query_side: Tensor
    span_at: Tensor
    mask: Tensor | None
    length: float

    @classmethod
    def of(cls, rules: ScoreRules, tile: BlockTiles, dtype: torch.dtype, mask: Tensor | None) -> TileRamps:
        spans, length = rules.options.spans, rules.options.ramp
        if spans is None:
            raise RuntimeError("no spans")
        i = rules.query_at.positions(tile.lanes, tile.query_slots)
        j = rules.key_at.positions(tile.lanes, tile.key_slots)
        span_at = rules.span_rows(tile.lanes) + j.clamp(0, spans.shape[2] - 1)
        first = i[:, :1]
        end = spans.to(dtype).flatten()[span_at] + (j - first)
        by_block = (len(span_at), -1, tile.block_k)
        return cls(
            (1 + end / length).view(by_block), (i - first).to(dtype) / length, span_at.view(by_block), mask, length
        )

    def bias(self) -> Tensor:
        """The gate's logarithm ``[T, a, m]``, -inf where it is shut, with the mask."""
        count, columns, block = self.key_side.shape
        rows = self.query_side.shape[1]
        bias = self.key_side.new_zeros(count, rows, columns, block)
        if self.mask is not None:
            bias += self.mask.unflatten(-1, (columns, block))
        # Most key tiles are open to every query.
        closing = torch.nonzero((self.key_side < 1 + self.query_side[:, -1:, None]).any(-1).any(0)).flatten().tolist()
        if closing:
            some = slice(closing[0], closing[-1] + 1)
            ramp = self.key_side[:, None, some] - self.query_side[:, :, None, None]
            bias[:, :, some] += additive((ramp <= 0).to(torch.int32).neg_(), ramp.dtype)
            bias[:, :, some] += ramp.clamp_(LEAST, 1).log_()
        return bias.flatten(2)

    def add_gradient(
        self, total: Tensor, operands: tuple[Tensor, Tensor, Tensor], lse: Tensor, delta: Tensor, grad: Tensor,
        scale: float,
    ) -> None:  # fmt: skip
        """Add the gradient of the spans to ``total`` (flat): ``operands`` are ``q [T, a, d]``, ``k, v [T, m, d]``;
        ``grad [T, a, d]``, the plan's ``lse, delta [T, a]``. Only key tiles with a pair on a ramp are computed."""
        on_ramp = ((self.key_side > 0) & (self.key_side < 1 + self.query_side[:, -1:, None])).any(-1)
        at, column = torch.nonzero(on_ramp, as_tuple=True)
        q, k, v = operands
        k, v = (x.reshape(*self.key_side.shape, x.shape[2])[at, column] for x in (k, v))
        scores = torch.bmm(q[at], k.transpose(1, 2)).mul_(scale)
        if self.mask is not None:
            by_block = self.mask.unflatten(-1, self.key_side.shape[1:])
            scores += by_block[_shared(at, by_block), :, column]
        ramp = self.key_side[at, column][:, None, :] - self.query_side[_shared(at, self.query_side), :, None]
        slope = ((ramp > 0) & (ramp < 1)).to(scores.dtype).div_(self.length)
        # A row without keys has lse -inf: shifted by +inf instead, all of its probabilities are 0.
        shift = torch.where(torch.isneginf(lse), torch.inf, lse)[at].unsqueeze(-1)
        ungated = scores.sub_(shift).exp_()
        upstream = torch.bmm(grad[at], v.transpose(1, 2)).sub_(delta[at].unsqueeze(-1))
        per_key = (ungated * upstream).mul_(slope).sum(1)
        total.scatter_add_(0, self.span_at[at, column].flatten(), per_key.flatten())


def _shared(at: Tensor, x: Tensor) -> Tensor:
    """Rows of ``x [T | 1, ...]``."""
    return at if len(x) > 1 else torch.zeros_like(at)
