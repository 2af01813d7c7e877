"""Slots in which a position may stand several times: gathered, and summed back to positions in a fixed order.

Registered operators, adjoint to one another: a compiler that took them apart would sum with atomic additions on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.slots import slot_rows


@torch.library.custom_op("sa_hf::take_slots", mutates_args=())
def take_slots(x: Tensor, index: Tensor) -> Tensor:
    """The slots ``[G, H, slots, D]`` of ``x [G, H | Hkv, N, D]`` that an int64 index ``[G, H, slots]`` without empty
    slots lists; differentiable in x."""
    rows, shape = slot_rows(index, x, index.shape[1])
    return x.reshape(-1, x.shape[3]).index_select(0, rows).view(*shape, x.shape[3])


@torch.library.custom_op("sa_hf::sum_slots", mutates_args=())
def sum_slots(x: Tensor, index: Tensor, heads: int, length: int) -> Tensor:
    """The adjoint of :func:`take_slots`: ``x [G, H, slots, D]`` summed at positions, ``[G, heads, length, D]``, fp32 or
    wider; ``heads`` divides H. Differentiable in x."""
    stats = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape[0], heads, length, x.shape[3], dtype=stats, device=x.device)
    rows, _ = slot_rows(index, total, x.shape[1])
    flat, values = total.view(-1, x.shape[3]), x.flatten(0, 2).to(stats)
    if x.device.type == "cpu":
        flat.index_add_(0, rows, values)
    else:  # sorts the rows first, where index_add_ would add in any order
        flat.index_put_((rows,), values, accumulate=True)
    return total


@take_slots.register_fake
def _(x, index):  # type: ignore[no-untyped-def]  # signature fixed by the operator
    return x.new_empty(*index.shape, x.shape[3])


@sum_slots.register_fake
def _(x, index, heads, length):  # type: ignore[no-untyped-def]  # signature fixed by the operator
    stats = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], heads, length, x.shape[3], dtype=stats)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # signature fixed by register_autograd
    x, index, *_ = inputs
    ctx.save_for_backward(index)
    ctx.of = x.shape[1], x.shape[2], x.dtype


def _take_backward(ctx, grad):  # type: ignore[no-untyped-def]  # signature fixed by register_autograd
    heads, length, dtype = ctx.of
    return sum_slots(grad, *ctx.saved_tensors, heads, length).to(dtype), None


def _sum_backward(ctx, grad):  # type: ignore[no-untyped-def]  # signature fixed by register_autograd
    return take_slots(grad, *ctx.saved_tensors).to(ctx.of[2]), None, None, None


take_slots.register_autograd(_take_backward, setup_context=_keep)
sum_slots.register_autograd(_sum_backward, setup_context=_keep)
