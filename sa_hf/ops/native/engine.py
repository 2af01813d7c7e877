"""The engine: prepares a part's tensors, runs its tiles, puts the results together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sa_hf.ops.engine import Gradients
from sa_hf.ops.native.lanes import Lanes
from sa_hf.ops.native.offsets import offsets_backward, offsets_forward
from sa_hf.ops.native.scores import OptionGradients, ScoreRules, tile_backward, tile_forward, tile_pairs
from sa_hf.ops.native.tiles import TileBatch, block_tiles, segment_tiles
from sa_hf.ops.parts import BlockPart, OffsetsPart, Part, ScoreOptions, SegmentPart

# Scores of a batch of tiles: 4 MB in fp32, which the temporaries of the softmax multiply by 2 to 6.
SCORES_AT_ONCE = 2**20


class NativeEngine:
    """Runs every part on every device; time and memory grow with the tiles that a part keeps."""

    name = "native"

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        return None

    def forward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor]:
        lanes = Lanes.of(query, key)
        rules = ScoreRules.of(options, lanes, part.query_index, part.key_index)
        q, k, v = (_flat(part, x, side) for x, side in ((query, "query"), (key, "key"), (value, "key")))
        if isinstance(part, OffsetsPart):
            out, lse = offsets_forward(part, rules, q, k, v)
        else:
            out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
            for tile in _tiles(part, lanes):
                pairs = tile_pairs(rules, tile, q.dtype)
                tile_out, tile_lse = tile_forward(options, pairs, tile.queries(q), tile.keys(k), tile.keys(v))
                tile.write_queries(out, tile_out)
                tile.write_queries(lse, tile_lse)
        out, lse = out[:, : query.shape[2]], lse[:, : query.shape[2]]
        if rules.query_filled is not None:
            out.masked_fill_(~rules.query_filled.unsqueeze(-1), 0)
            lse.masked_fill_(~rules.query_filled, -torch.inf)
        return out.reshape(query.shape).to(query.dtype), lse.reshape(query.shape[:3])

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        options: ScoreOptions,
    ) -> Gradients:  # fmt: skip
        lanes = Lanes.of(query, key)
        rules = ScoreRules.of(options, lanes, part.query_index, part.key_index)
        q, k, v = (_flat(part, x, side) for x, side in ((query, "query"), (key, "key"), (value, "key")))
        grad = _flat(part, grad_out, "query")
        delta = (grad * _flat(part, out, "query")).sum(-1)
        lse = _flat(part, lse.unsqueeze(-1), "query").squeeze(-1)
        gathered = OptionGradients.zeros(options, q.dtype)
        if isinstance(part, OffsetsPart):
            grads = offsets_backward(part, rules, q, k, v, lse, delta, grad, gathered)
        else:
            grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for tile in _tiles(part, lanes):
                pairs = tile_pairs(rules, tile, q.dtype)
                tile_q, tile_k, tile_v = tile_backward(
                    options, pairs, tile.queries(q), tile.keys(k), tile.keys(v), tile.queries(lse), tile.queries(delta),
                    tile.queries(grad), gathered,
                )  # fmt: skip
                tile.write_queries(grads[0], tile_q)
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


def _tiles(part: BlockPart | SegmentPart, lanes: Lanes) -> Iterator[TileBatch]:
    if isinstance(part, BlockPart):
        return block_tiles(part, lanes, SCORES_AT_ONCE)
    return segment_tiles(part, lanes, SCORES_AT_ONCE)


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
