"""Between positions and a part's slots: bring slots together, put them back, merge their softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sa_hf.ops.graphs import capturing, settled
from sa_hf.ops.parts import Index, Part

# Elements merged at once on the CPU: 1 MB in fp32 stays in the cache.
MERGED_ON_CPU = 2**18


def take(x: Tensor, index: Index) -> Tensor:
    """The slots of ``x [G, H, N, D]`` in a part's order; empty slots are 0, heads grow to those of a tensor index."""
    if index is None:
        return x
    if isinstance(index, slice):
        return x[:, :, index]
    rows, shape = slot_rows(index, x, max(x.shape[1], index.shape[1]))
    taken = x.reshape(-1, x.shape[3]).index_select(0, rows).view(*shape, x.shape[3])
    return taken.masked_fill_((index < 0).unsqueeze(-1), 0) if may_be_empty(index) else taken


def put(x: Tensor, index: Index, like: Tensor) -> Tensor:
    """The adjoint of :func:`take`: slots added back to positions, in the shape of ``like [G, H, N, D]``."""
    if index is None:
        return x
    result = x.new_zeros(like.shape)
    add_slots(result, x, index)
    return result


def add_slots(target: Tensor, x: Tensor, index: Index, *, repeated: bool = False) -> None:
    """Add slots ``x [G, H, slots, D]`` to their positions in ``target [G, H | Hkv, N, D]`` (contiguous), in place.

    A position stands in one slot of a head at most, unless ``repeated``.
    """
    if index is None:
        target += x
    elif isinstance(index, slice):
        target[:, :, index] += x
    else:
        rows, shape = slot_rows(index, target, x.shape[1])
        filled = x.masked_fill((index < 0).unsqueeze(-1), 0) if may_be_empty(index) else x
        flat, filled = target.view(-1, target.shape[3]), filled.to(target.dtype)
        if repeated and target.device.type != "cpu":  # sorts the rows first, where index_add_ would add in any order
            flat.index_put_((rows,), filled.flatten(0, 2), accumulate=True)
            return
        # A GPU adds in any order what one call adds to a row: there the heads of a group follow one another.
        turns = 1 if target.device.type == "cpu" else x.shape[1] // target.shape[1]
        for turn in range(turns):
            heads = slice(turn, None, turns)
            flat.index_add_(0, rows.view(shape)[:, heads].flatten(), filled[:, heads].flatten(0, 2))


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, index: Index) -> None:
    """Merge a part's slots into the running result ``out [G, H, N, D]``, ``lse [G, H, N]`` (contiguous, of one dtype
    with the part's), in place: one softmax over both sets of keys."""
    if isinstance(index, slice):
        out, lse = out[:, :, index], lse[:, :, index]
    if not isinstance(index, Tensor):
        out.lerp_(part_out, share_of(lse, part_lse).unsqueeze(-1))
        lse.copy_(torch.logaddexp(lse, part_lse))
        return
    all_rows, _ = slot_rows(index, out, out.shape[1])
    # Empty slots stand at position 0 beside a real one: they may write only what changes nothing, in any order.
    all_lse = (part_lse.masked_fill(index < 0, -torch.inf) if may_be_empty(index) else part_lse).flatten()
    all_out = part_out.reshape(-1, out.shape[3])
    flat_out, flat_lse = out.view(-1, out.shape[3]), lse.view(-1)
    at_once = max(1, MERGED_ON_CPU // out.shape[3]) if out.device.type == "cpu" else len(all_rows)
    runs = zip(*(x.split(at_once) for x in (all_rows, all_out, all_lse)), strict=True)
    for rows, run_out, run_lse in runs:
        there = flat_lse[rows]
        change = run_out - flat_out.index_select(0, rows)
        flat_out.index_add_(0, rows, change.mul_(share_of(there, run_lse).unsqueeze(-1)))
        flat_lse.scatter_reduce_(0, rows, torch.logaddexp(there, run_lse), "amax")


# Of indices that live with a plan: whether some slot is empty.
_HAS_EMPTY: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def examine_slots(plan: Sequence[Part]) -> None:
    """Look once for empty slots in the indices of a plan that will be kept: calls need not ask the device again."""
    for part in plan:
        for index in (part.query_index, part.key_index):
            if isinstance(index, Tensor):
                _HAS_EMPTY[index] = bool((index < 0).any())


# Of the same indices, what was made of them: by name.
_MADE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def made_of(index: Tensor, name: str, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` makes of an index: once where it lives with a plan, else at each call."""
    if torch.compiler.is_compiling() or index not in _HAS_EMPTY:
        return make()
    known: dict[str, Tensor] = _MADE.setdefault(index, {})
    if name not in known:
        made = make()
        if capturing(index):
            return made
        known[name] = settled(made)
    return known[name]


def may_be_empty(index: Tensor) -> bool:
    """Whether some slot is empty; not looked at in a trace, nor on a GPU, where the answer would wait for it."""
    if torch.compiler.is_compiling():
        return True
    if index in _HAS_EMPTY:
        return bool(_HAS_EMPTY[index])
    return not on_host(index) or bool((index < 0).any())


def on_host(index: Tensor) -> bool:
    """Whether its numbers are read without waiting for a device; a stand-in for one answers otherwise
    (``tools.bench.precompile``)."""
    return index.device.type == "cpu"


def share_of(lse: Tensor, part_lse: Tensor) -> Tensor:
    """The part's share of the joint softmax mass; 0 where neither has any."""
    return torch.sigmoid(torch.where(torch.isneginf(part_lse), -torch.inf, part_lse - lse))


def slot_rows(index: Tensor, x: Tensor, heads: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Of each slot the row of ``x [G, H, N, D]`` viewed as ``[G * H * N, D]`` (empty slots: position 0), and the shape
    ``(G, heads, slots)``; query heads of a group share a row of x."""
    batch, own, length, _ = x.shape
    make = _first_rows.__wrapped__ if torch.compiler.is_compiling() or capturing(x) else _first_rows
    slots = index.clamp(min=0) if may_be_empty(index) else index
    return (make(batch, own, heads, length, x.device) + slots).flatten(), (batch, heads, index.shape[2])


@lru_cache(maxsize=256)
def _first_rows(batch: int, own: int, heads: int, length: int, device: torch.device) -> Tensor:
    """Where the rows of each lane begin, int64 ``[batch, heads, 1]``; ``own`` heads serve ``heads`` query heads."""
    lane = torch.arange(batch, device=device)[:, None] * own + torch.arange(heads, device=device) // (heads // own)
    return lane.unsqueeze(-1) * length
