"""The engine: hands a part to the C++ kernels, or runs its tiles by torch's operators (fp64, or no compiler)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from sa_hf.ops.engine import Gradients
from sa_hf.ops.native import flash, gates, kernels
from sa_hf.ops.native.blocks import BlockTiles, block_tiles
from sa_hf.ops.native.lanes import Lanes
from sa_hf.ops.native.masks import additive
from sa_hf.ops.native.memory import keep_freed_memory
from sa_hf.ops.native.offsets import offsets_backward, offsets_forward
from sa_hf.ops.native.scores import (
    OptionGradients,
    Pairs,
    ScoreRules,
    masked_pairs,
    tile_backward,
    tile_forward,
    tile_pairs,
)
from sa_hf.ops.native.segments import segment_tiles
from sa_hf.ops.native.tall import taller
from sa_hf.ops.native.tiles import Budget, TileBatch
from sa_hf.ops.parts import BlockPart, OffsetsPart, Part, ScoreOptions, SegmentPart

# Scores of a batch of tiles in plain torch: 2 MB in fp32, which the temporaries of the softmax multiply by 2 to 6.
PLAIN = Budget(scores=2**19, keys=2**20)
# The flash op holds no scores; gathered keys and values of 2 MB each (any head_dim) stay in the cache of 2 cores.
FLASH_KEY_ELEMENTS = 2**19
# The flash op multiplies 32 rows at a time in tiles of fewer.
TALL_ROWS = 192


class NativeEngine:
    """Runs every part on every device; time and memory grow with the tiles that a part keeps."""

    name = "native"
    own_rows = False

    def in_place(self, query: Tensor) -> bool:
        return kernels.serves(query)

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        return None

    def forward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor]:
        part = simplest(part)
        if kernels.serves(query):
            return kernels.forward(part, query, key, value, options)
        part, fast = _prepared(part, query, options)
        lanes = Lanes.of(query, key)
        rules = ScoreRules.of(options, lanes, part.query_index, part.key_index)
        q, k, v = (_flat(part, x, side) for x, side in ((query, "query"), (key, "key"), (value, "key")))
        if isinstance(part, OffsetsPart):
            out, lse = offsets_forward(part, rules, q, k, v)
        else:
            out, lse = torch.empty_like(q), q.new_full(q.shape[:2], -torch.inf)
            for tile in _tiles(part, rules, q.shape[-1], fast):
                operands = tile.queries(q), tile.keys(k), tile.keys(v)
                pairs, _ = _pairs(rules, tile, q.dtype, fast)
                if fast and _tall(tile, operands[0]):
                    tile_out, tile_lse = flash.flash_forward(
                        *operands, pairs.added, options.scale, causal=tile.triangular
                    )
                else:
                    tile_out, tile_lse = tile_forward(options, pairs, *operands)
                tile.write_result(out, lse, tile_out, tile_lse)
        out, lse = out[:, : query.shape[2]], lse[:, : query.shape[2]]
        if rules.query_filled is not None:
            lse.masked_fill_(~rules.query_filled, -torch.inf)
        # Rows that no tile wrote are those without keys: most parts have none, so they are not filled beforehand.
        empty = torch.isneginf(lse)
        if empty.device.type != "cpu":
            out.masked_fill_(empty.unsqueeze(-1), 0)
        else:
            out[torch.nonzero(empty, as_tuple=True)] = 0
        return out.reshape(query.shape).to(query.dtype), lse.reshape(query.shape[:3])

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        options: ScoreOptions,
    ) -> Gradients:  # fmt: skip
        part = simplest(part)
        if kernels.serves(query):
            return kernels.backward(part, query, key, value, out, lse, grad_out, options)
        part, fast = _prepared(part, query, options)
        lanes = Lanes.of(query, key)
        rules = ScoreRules.of(options, lanes, part.query_index, part.key_index)
        q, k, v = (_flat(part, x, side) for x, side in ((query, "query"), (key, "key"), (value, "key")))
        o, grad = _flat(part, out, "query"), _flat(part, grad_out, "query")
        lse = _flat(part, lse.unsqueeze(-1), "query").squeeze(-1)
        gathered = OptionGradients.zeros(options, q.dtype)
        if isinstance(part, OffsetsPart):
            grads = offsets_backward(part, rules, q, k, v, lse, _delta(grad, o), grad, gathered)
        else:
            grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for tile in _tiles(part, rules, q.shape[-1], fast):
                operands = tile.queries(q), tile.keys(k), tile.keys(v)
                tile_out, tile_lse, tile_grad = tile.queries(o), tile.queries(lse), tile.queries(grad)
                pairs, ramps = _pairs(rules, tile, q.dtype, fast)
                if fast and _tall(tile, operands[0]):
                    tile_q, tile_k, tile_v = flash.flash_backward(
                        tile_grad, *operands, tile_out, tile_lse, pairs.added, options.scale, causal=tile.triangular
                    )
                else:
                    tile_q, tile_k, tile_v = tile_backward(
                        options, pairs, *operands, tile_lse, _delta(tile_grad, tile_out), tile_grad, gathered
                    )
                if ramps is not None and gathered.spans is not None:
                    delta = _delta(tile_grad, tile_out)
                    ramps.add_gradient(gathered.spans, operands, tile_lse, delta, tile_grad, options.scale)
                tile.write_gradient(grads[0], tile_q)
                tile.add_keys(grads[1], tile_k)
                tile.add_keys(grads[2], tile_v)
        grad_query, grad_key, grad_value = (
            g[:, : x.shape[2]].reshape(x.shape).to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True)
        )
        return Gradients(
            grad_query,
            grad_key,
            grad_value,
            _like(gathered.distance_bias, options.distance_bias),
            _like(gathered.spans, options.spans),
        )


def _prepared(part: Part, query: Tensor, options: ScoreOptions) -> tuple[Part, bool]:
    """The part in the form that torch's operators run best, and whether the flash op runs it."""
    if query.device.type == "cpu":
        keep_freed_memory()
    if isinstance(part, OffsetsPart) or not flash.serves(query, options):
        return part, False
    if options.spans is not None and not gates.serves(part, options):
        return part, False
    if isinstance(part, BlockPart):
        part = replace(part, layout=taller(part.layout))
    return part, True


def simplest(part: Part) -> Part:
    """Segments of one slot are the offset 0: elementwise products instead of 1 x 1 matrices."""
    if isinstance(part, SegmentPart) and part.query_segment == part.key_segment == 1:
        length = min(part.query_slots, part.key_slots)
        own = not part.skip_diagonal and all(bound is None or bound >= 0 for bound in (part.band.left, part.band.right))
        offsets: tuple[int, ...] = (0,) if own else ()
        return OffsetsPart(part.query_slots, (offsets,), 0, length, part.query_index, part.key_index)
    return part


def _tiles(part: BlockPart | SegmentPart, rules: ScoreRules, head_dim: int, fast: bool) -> Iterable[TileBatch]:
    budget = Budget(scores=2**40, keys=FLASH_KEY_ELEMENTS // head_dim) if fast else PLAIN
    if isinstance(part, BlockPart):
        return block_tiles(part.layout, rules.lanes, budget)
    return segment_tiles(part, rules.lanes, budget, whole_segments=fast and rules.key_filled is None)


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    return (grad * out).sum(-1)


def _tall(tile: TileBatch, queries: Tensor) -> bool:
    """Whether the flash op runs a batch of tiles faster than products of matrices."""
    return tile.triangular or queries.shape[1] >= TALL_ROWS


def _pairs(
    rules: ScoreRules, tile: TileBatch, dtype: torch.dtype, fast: bool
) -> tuple[Pairs, gates.TileRamps | None]:  # fmt: skip
    """What the options say about a batch of tiles; for the flash op as one tensor that it adds to the scores (the mask,
    the gate's logarithm), with what made the gate."""
    if not fast:
        return tile_pairs(rules, tile, dtype), None
    mask = masked_pairs(rules, tile)
    added = None if mask is None else additive(mask, dtype)
    if rules.options.spans is None or not isinstance(tile, BlockTiles):
        return Pairs(None, added), None
    ramps = gates.TileRamps.of(rules, tile, dtype, added)
    return Pairs(None, ramps.bias()), ramps


def _flat(part: Part, x: Tensor, side: str) -> Tensor:
    """``[B, H, N, D]`` as contiguous ``[B * H, padded N, D]`` in the accumulation dtype (fp32, or fp64 for fp64)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
    if isinstance(part, BlockPart):
        layout = part.layout
        size = layout.num_query_blocks * layout.block_q if side == "query" else layout.num_key_blocks * layout.block_k
        if size != x.shape[1]:
            return torch.nn.functional.pad(x, (0, 0, 0, size - x.shape[1]))
    return x.contiguous()


def _like(flat: Tensor | None, source: Tensor | None) -> Tensor | None:
    return None if flat is None or source is None else flat.view(source.shape).to(source.dtype)
