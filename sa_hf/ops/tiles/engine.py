"""The engine: a part's tiles batch after batch, their results merged and their gradients added up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sa_hf.ops.engine import NO_TERMS, Engine, Gradients
from sa_hf.ops.lanes import Lanes, Places
from sa_hf.ops.memory import keep_freed_memory
from sa_hf.ops.parts import BlockPart, Part, ScoreOptions
from sa_hf.ops.slots import share_of
from sa_hf.ops.tiles.batches import Tiles, tiles_of
from sa_hf.ops.tiles.decode import decode_gathered
from sa_hf.ops.tiles.scores import OptionGradients, Pairs, add_rows, tile_backward, tile_forward


class TileEngine(Engine):
    """Runs every part on every device, in fp32 or fp64; time and memory grow with the tiles that a part keeps."""

    name = "torch"

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        return None

    def cannot_decode(self, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> str | None:
        return None if options.terms == (None, None) else NO_TERMS

    def forward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor]:
        if query.device.type == "cpu":
            keep_freed_memory()
        call = _Call(part, query, key, options)
        options = call.options
        q, k, v = call.queries(query), call.keys(key), call.keys(value)
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:1], -torch.inf)
        for tiles, rows, columns in call.batches():
            pairs = Pairs.of(call.places, tiles, q.dtype)
            tile_out, tile_lse = tile_forward(options, pairs, q[rows], k[columns], v[columns])
            before = lse[rows]
            share = share_of(before, tile_lse).unsqueeze(-1)
            out.index_copy_(0, rows.flatten(), torch.lerp(out[rows], tile_out, share).flatten(0, 1))
            lse.index_copy_(0, rows.flatten(), torch.logaddexp(before, tile_lse).flatten())
        filled = call.places.query_at.table
        out, lse = call.back(out, query), call.back(lse, query)
        if filled is not None:
            empty = (filled < 0).view(lse.shape)
            out, lse = out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)
        return out.to(query.dtype), lse

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        options: ScoreOptions,
    ) -> Gradients:  # fmt: skip
        call = _Call(part, query, key, options)
        given, options = options, call.options
        q, k, v = call.queries(query), call.keys(key), call.keys(value)
        # Rows behind the end have probabilities of 0, whatever the terms of their keys.
        grad, row_lse = call.queries(grad_out), call.queries(lse.unsqueeze(-1), torch.inf).squeeze(-1)
        delta = (grad * call.queries(out)).sum(-1)
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        gathered = OptionGradients.zeros(options, q.dtype)
        for tiles, rows, columns in call.batches():
            pairs = Pairs.of(call.places, tiles, q.dtype)
            made = tile_backward(
                options, pairs, q[rows], k[columns], v[columns], row_lse[rows], delta[rows], grad[rows], gathered
            )  # fmt: skip
            for total, at, x in zip(grads, (rows, columns, columns), made, strict=True):
                add_rows(total, at.flatten(), x.flatten(0, 1))
        of_query, of_key, of_value = (
            call.back(g, x).to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True)
        )
        flat = gathered.distance_bias, gathered.spans, None, *gathered.terms
        of_options = (
            None if x is None or source is None else x.view(source.shape).to(source.dtype)
            for x, source in zip(flat, given.learned, strict=True)
        )
        return Gradients(of_query, of_key, of_value, *of_options)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
        return decode_gathered(query, key, value, index, options)


class _Call:
    """A part over the tensors of a call, flat: ``[lanes * padded slots, ...]`` a side, padded to whole tiles."""

    def __init__(self, part: Part, query: Tensor, key: Tensor, options: ScoreOptions) -> None:
        self.part, self.head_dim = part, query.shape[3]
        self.lanes = Lanes.of(query, key)
        stats = torch.promote_types(query.dtype, torch.float32)
        # Once for all tiles: values are as long as the sequence.
        terms = (None if term is None else term.values.to(stats).contiguous() for term in options.terms)
        self.options = options = options.with_learned([*options.learned[:3], *terms])
        self.places = Places.of(options, self.lanes, part.query_index, part.key_index)
        self.query_slots, self.key_slots = query.shape[2], key.shape[2]
        if isinstance(part, BlockPart):
            self.query_slots = part.layout.num_query_blocks * part.layout.block_q
            self.key_slots = part.layout.num_key_blocks * part.layout.block_k

    def queries(self, x: Tensor, behind: float = 0.0) -> Tensor:
        return self._flat(x, self.query_slots, behind)

    def keys(self, x: Tensor) -> Tensor:
        return self._flat(x, self.key_slots)

    @staticmethod
    def _flat(x: Tensor, slots: int, behind: float = 0.0) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.nn.functional.pad(x, (0, 0, 0, slots - x.shape[2]), value=behind).flatten(0, 2)

    @staticmethod
    def back(flat: Tensor, like: Tensor) -> Tensor:
        """``[G, H, slots, ...]`` without the padding."""
        return flat.view(*like.shape[:2], -1, *flat.shape[1:])[:, :, : like.shape[2]]

    def batches(self) -> Iterator[tuple[Tiles, Tensor, Tensor]]:
        """The batches of tiles, each with the flat rows of its queries ``[T, a]`` and of its keys ``[T, m]``."""
        for tiles in tiles_of(self.part, self.lanes, self.key_slots, self.head_dim):
            lanes = tiles.lanes[:, None]
            yield (
                tiles, lanes * self.query_slots + tiles.query_slots,
                self.lanes.key_lanes(lanes) * self.key_slots + tiles.key_slots,
            )  # fmt: skip
