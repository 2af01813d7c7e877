"""Slots in which positions repeat: gathered and summed, against plain loops."""

from __future__ import annotations

import pytest
import torch

from sa_hf.ops.members import sum_slots, take_slots


@pytest.mark.parametrize(("heads", "own"), [(2, 2), (4, 2), (3, 1)])
def test_take_and_sum(heads: int, own: int) -> None:
    batch, n, slots, d = 2, 5, 9, 3
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, own, n, d, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(batch, heads, slots, d, generator=g, dtype=torch.float64, requires_grad=True)
    index = torch.randint(n, (batch, heads, slots), generator=g)
    taken, summed = take_slots(x, index), sum_slots(y, index, own, n)
    expected = torch.zeros(batch, own, n, d, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for s in range(slots):
                assert torch.equal(taken[b, h, s], x[b, h // (heads // own), index[b, h, s]])
                expected[b, h // (heads // own), index[b, h, s]] += y[b, h, s].detach()
    torch.testing.assert_close(summed, expected)
    # Adjoint to one another: <take(x), y> == <x, sum(y)>, through the gradients too.
    torch.testing.assert_close(torch.autograd.grad(taken, x, y.detach())[0], expected)
    torch.testing.assert_close(torch.autograd.grad(summed, y, x.detach())[0], taken)


def test_operators_are_registered_whole() -> None:
    x, index = torch.randn(1, 1, 4, 2, requires_grad=True), torch.tensor([[[0, 3, 3], [1, 1, 2]]])
    torch.library.opcheck(take_slots, (x, index))
    torch.library.opcheck(sum_slots, (torch.randn(1, 2, 3, 2, requires_grad=True), index, 1, 4))


def test_sixteen_bits_are_summed_in_fp32() -> None:
    x = torch.full((1, 1, 600, 1), 1.0, dtype=torch.bfloat16)
    assert float(sum_slots(x, torch.zeros(1, 1, 600, dtype=torch.int64), 1, 1)) == 600.0
