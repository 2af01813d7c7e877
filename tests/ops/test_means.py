"""Means over slots in which positions repeat, against plain loops; outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sa_hf.ops import pieces as cutting
from sa_hf.ops.choice import choose_engine
from sa_hf.ops.means import means_backward, means_forward
from sa_hf.ops.parts import Part, ScoreOptions, SegmentPart
from sa_hf.ops.slots import add_slots

pytestmark = pytest.mark.usefixtures("cpu_path")

N, SLOTS, SEGMENT, D, SCALE = 6, 8, 4, 3, 0.4


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loops(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, alone: list[int]) -> Tensor:
    """The mean over a position's slots of attention inside the segments; a position in none attends ``alone``."""
    out = []
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            k, v = key[b, h // group], value[b, h // group]
            for i in range(N):
                found = [s for s in range(SLOTS) if int(rows[b, h, s]) == i]
                reads = [columns[b, h, s // SEGMENT * SEGMENT :][:SEGMENT].tolist() for s in found] or [alone]
                each = [torch.softmax(SCALE * k[r] @ query[b, h, i], 0) @ v[r] for r in reads]
                out.append(torch.stack(each).mean(0))
    return torch.stack(out).view(query.shape)


@pytest.mark.parametrize("elements", [cutting.ELEMENTS, 1])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 2, 2), (2, 4, 2), (2, 3, 1)])
def test_means_are_the_plain_loops(
    batch: int, heads: int, kv_heads: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    # The last position stands in no slot of a query.
    rows = torch.randint(N - 1, (batch, heads, SLOTS), generator=generator)
    rows[..., : N - 1] = torch.arange(N - 1)
    columns = torch.randint(N, (batch, heads, SLOTS), generator=generator)
    query = draw(batch, heads, N, D, seed=1).requires_grad_()
    key, value = (draw(batch, kv_heads, N, D, seed=s).requires_grad_() for s in (2, 3))
    grad = draw(batch, heads, N, D, seed=4)
    last = torch.full((1, 1, 1), N - 1)
    plan: list[Part] = [
        SegmentPart(SLOTS, SLOTS, SEGMENT, SEGMENT, query_index=rows, key_index=columns),
        SegmentPart(1, 2, 1, 2, query_index=last, key_index=torch.tensor([[[1, 4]]])),
    ]
    expected = loops(query, key, value, rows, columns, [1, 4])
    options = ScoreOptions(SCALE)
    engine = choose_engine("native", query, options)
    with torch.no_grad():
        means = means_forward(plan, query, key, value, options, engine)
        grads = means_backward(plan, query, key, value, means, grad, options, engine)
    torch.testing.assert_close(means.out, expected)
    wanted = torch.autograd.grad(expected, (query, key, value), grad)
    for ours, oracle in zip((grads.query, grads.key, grads.value), wanted, strict=True):
        torch.testing.assert_close(ours, oracle)


def test_sixteen_bits_are_summed_in_fp32() -> None:
    x, total = torch.ones(1, 1, 600, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 1)
    add_slots(total, x, torch.zeros(1, 1, 600, dtype=torch.int64), repeated=True)
    assert float(total) == 600.0
