"""Parts of every kind for the engine tests, the pairs that they keep by plain loops, and the comparison with fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sa_hf.ops.choice import choose_engine
from sa_hf.ops.engine import Engine
from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import BAND, FULL, Band, BlockPart, OffsetsPart, Part, ScoreOptions, SegmentPart
from sa_hf.ops.reference import dense_attention, part_multiplicity
from sa_hf.ops.run import plan_backward, plan_forward

BLOCK = 16


def slot_kept(part: Part, batch: int, head: int, i: int, j: int) -> bool:
    """Whether query slot ``i`` reads key slot ``j``, from the docstrings of the parts."""
    if isinstance(part, OffsetsPart):
        offsets = part.offsets[head if len(part.offsets) > 1 else 0]
        inside = part.begin <= i < part.stop and part.begin <= j < part.stop
        return inside and i - j in offsets
    if isinstance(part, SegmentPart):
        a, b = i % part.query_segment, j % part.key_segment
        same = i // part.query_segment == j // part.key_segment
        return same and in_band(part.band, a, b) and not (part.skip_diagonal and a == b)
    layout = part.layout
    b, h = (batch if layout.batch > 1 else 0), (head if layout.heads > 1 else 0)
    if layout.key_range is not None:
        low, high = layout.key_range[b % len(layout.key_range), h % layout.key_range.shape[1], i].tolist()
        if not low <= j < high:
            return False
    row = (b * layout.heads + h) * layout.num_query_blocks + i // layout.block_q
    for entry in range(int(layout.row_start[row]), int(layout.row_start[row + 1])):
        if int(layout.columns[entry]) == j // layout.block_k:
            kind = int(layout.kind[entry])
            if kind == FULL:
                return True
            if kind == BAND:
                return in_band(layout.band, i, j)
            return bool(layout.masks[kind, i % layout.block_q, j % layout.block_k])
    return False


def in_band(band: Band, i: int, j: int) -> bool:
    return (band.left is None or i - j <= band.left) and (band.right is None or j - i <= band.right)


def index_at(index: Tensor | slice | None, batch: int, head: int, slot: int) -> int:
    if index is None:
        return slot
    if isinstance(index, slice):
        return index.start + slot
    return int(index[batch % index.shape[0], head % index.shape[1], slot])


def loop_multiplicity(part: Part, batch: int, heads: int, query_length: int, key_length: int) -> Tensor:
    """How often each pair of positions is read, int64 ``[batch, heads, query_length, key_length]``, by plain loops."""
    query_slots = part.length if isinstance(part, OffsetsPart) else _slots(part)[0]
    key_slots = part.length if isinstance(part, OffsetsPart) else _slots(part)[1]
    result = torch.zeros(batch, heads, query_length, key_length, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            for i in range(query_slots):
                for j in range(key_slots):
                    at, to = index_at(part.query_index, b, h, i), index_at(part.key_index, b, h, j)
                    if at >= 0 and to >= 0 and slot_kept(part, b, h, i, j):
                        result[b, h, at, to] += 1
    return result


def _slots(part: BlockPart | SegmentPart) -> tuple[int, int]:
    shape = part.layout if isinstance(part, BlockPart) else part
    return shape.query_slots, shape.key_slots


def random_layout_part(n: int, heads: int, seed: int = 0, band: Band = Band(None, 0)) -> BlockPart:
    """Block lists of a random predicate per head: full, empty and partial tiles."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.rand(heads, -(-n // BLOCK), -(-n // BLOCK), generator=generator) < 0.4
    table = tiles.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :n, :n]
    table = table & (
        (torch.rand(heads, n, n, generator=generator) < 0.7) | (torch.rand(heads, 1, n, generator=generator) < 0.5)
    )

    def predicate(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        head, i, j = torch.broadcast_tensors(head, i, j)
        return table[head, i.clamp(min=0), j.clamp(min=0)]

    return BlockPart(build_layout(predicate, n, n, heads=heads, block=BLOCK, band=band))


def window_part(n: int, band: Band) -> BlockPart:
    def everything(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.ones_like(i - j, dtype=torch.bool)

    return BlockPart(build_layout(everything, n, n, heads=1, block=BLOCK, band=band))


def shuffled(n: int, heads: int, seed: int, *, empty: int) -> Tensor:
    """A permutation of the positions per head with ``empty`` slots (-1) among them, int64 ``[1, heads, n]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(n, generator=generator) for _ in range(heads)])
    for row in rows:
        row[torch.randperm(n, generator=generator)[: min(empty, n - 1)]] = -1
    return rows[None]


def part_cases(n: int, batch: int, heads: int) -> dict[str, list[Part]]:
    """Plans of one or several parts over ``n`` positions, every kind of part and index among them."""
    window = window_part(n, Band(20, 3))
    generator = torch.Generator().manual_seed(n)
    ranges = torch.randint(0, n + 1, (batch, heads, n, 2), generator=generator).sort(-1).values.int()
    batched = replace(random_layout_part(n, batch * heads).layout, batch=batch, heads=heads, key_range=ranges)
    slots, keys = shuffled(n, heads, 1, empty=2), shuffled(n, heads, 2, empty=3)
    two = min(2, n)
    return {
        "blocks per head": [random_layout_part(n, heads)],
        "blocks shared": [window],
        "blocks per sequence, key range": [BlockPart(batched)],
        "blocks reordered": [BlockPart(window.layout, query_index=slots, key_index=keys)],
        "segments": [SegmentPart(n, n, 24, 24)],
        "segments causal": [SegmentPart(n, n, 70, 70, band=Band(None, 0))],
        "segments without diagonal": [SegmentPart(n, n, 10, 10, band=Band(4, 2), skip_diagonal=True)],
        "one segment, window": [SegmentPart(n, n, n, n, band=Band(17, 0))],
        "segments reordered": [SegmentPart(n, n, 5, 7, query_index=slots, key_index=keys)],
        "segments of one": [SegmentPart(n, n, 1, 1)],
        "more queries than keys": [SegmentPart(n, max(n // 3, 1), 9, 4, key_index=slice(0, max(n // 3, 1)))],
        "offsets": [OffsetsPart(n, ((0, 1, 2, 4, 8, 64, -3),))],
        "offsets per head": [
            OffsetsPart(n, tuple(tuple(range(0, 2 * h + 1, h + 1)) for h in range(heads)), begin=1, end=max(1, n - 1))
        ],
        "offsets reordered": [OffsetsPart(n, ((0, 1, 5),), query_index=slots, key_index=keys)],
        "global slots": [SegmentPart(two, n, two, n, query_index=slice(0, two)), window],
        "union": [SegmentPart(n, n, 24, 24), OffsetsPart(n, ((0, 3, 24),)), random_layout_part(n, heads, seed=5)],
    }  # fmt: skip


@dataclass
class Compared:
    """Root-mean-square error over that of the oracle: output and gradients, by name."""

    errors: dict[str, float]
    lse_error: float
    tensors: dict[str, Tensor]

    def worst(self) -> float:
        return max(*self.errors.values(), self.lse_error)


def rms_ratio(ours: Tensor, oracle: Tensor, smallest: float = 0.05) -> float:
    """RMS of the difference over RMS of the oracle; over ``smallest`` where the oracle is smaller (a row with one key
    has no gradient but the rounding of terms of order 1)."""
    ours, oracle = ours.detach().double(), oracle.detach().double()
    size = oracle.pow(2).mean().sqrt().clamp(min=smallest)
    return float((ours - oracle).pow(2).mean().sqrt() / size)


def compare(
    plan: list[Part], *, batch: int = 1, heads: int = 2, kv_heads: int = 2, query_length: int, key_length: int,
    head_dim: int = 16, dtype: torch.dtype = torch.float32, options: ScoreOptions | None = None, seed: int = 0,
    engine: Engine | None = None,
) -> Compared:  # fmt: skip
    """Run a plan forward and backward, and the fp64 oracle on the same inputs; nothing may be NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    q = draw(batch, heads, query_length, head_dim)
    k, v = (draw(batch, kv_heads, key_length, head_dim) for _ in range(2))
    upstream = draw(batch, heads, query_length, head_dim).detach()
    options = options or ScoreOptions(scale=head_dim**-0.5)
    options = replace(options, query_offset=key_length - query_length)
    counts = sum(part_multiplicity(p, query_length, key_length).expand(batch, heads, -1, -1) for p in plan)
    out, lse = dense_attention(q, k, v, counts, options)
    names = ("bias", "spans", "sinks", "query_term", "key_term")
    learned = dict(zip(names, options.learned, strict=True))
    inputs = {"query": q, "key": k, "value": v, **{name: x for name, x in learned.items() if x is not None}}
    wanted = torch.autograd.grad(out, list(inputs.values()), upstream, allow_unused=True)
    runner = engine or choose_engine("native", q, options)
    with torch.no_grad():
        ours, our_lse = plan_forward(plan, q, k, v, options, runner)
        grads = plan_backward(plan, q, k, v, ours, our_lse, upstream, options, runner)
    found = {"query": grads.query, "key": grads.key, "value": grads.value}
    found |= {name: getattr(grads, {"bias": "distance_bias"}.get(name, name)) for name in inputs if name not in found}
    empty = torch.isneginf(lse)
    assert torch.equal(empty, torch.isneginf(our_lse))
    assert not ours[empty].any()
    errors = {"output": rms_ratio(ours, out)}
    for (name, x), gradient in zip(inputs.items(), wanted, strict=True):
        wanted = torch.zeros_like(x) if gradient is None else gradient
        # An entry of the table adds up the rounding of all the rows at its distance.
        errors[name] = rms_ratio(found[name], wanted, 0.05 * (query_length**0.5 if name == "bias" else 1))
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
    lse_error = float((our_lse.double() - lse.detach())[~empty].abs().max()) if not bool(empty.all()) else 0.0
    assert all(torch.isfinite(x).all() for x in (ours, *found.values()))
    return Compared(errors, lse_error, {"output": ours, **found})
