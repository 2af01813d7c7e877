"""The row kernels under the interpreter: against the torch path of ``ops.slots``, and whole plans against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_exact, error, guarded
from torch import Tensor

from sa_hf.ops.choice import TRITON
from sa_hf.ops.parts import Band, Index, OffsetsPart, Part, ScoreOptions, SegmentPart
from sa_hf.ops.pieces import Piece
from sa_hf.ops.slots import add_slots, examine_slots, merge_into, take
from sa_hf.ops.triton import launch_rows
from sa_hf.ops.triton.launch_rows import gather
from sa_hf.ops.triton.rows import MOST_PARTS
from sa_hf.ops.triton.sums import KernelMerging, KernelTotal

pytestmark = pytest.mark.usefixtures("nan_filled")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_index(batch: int, heads: int, length: int, slots: int, *, empty: int, seed: int = 0) -> Tensor:
    """Distinct positions per head in any order, ``empty`` slots among them, int64 ``[batch, heads, slots]``."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(batch, heads, length, generator=generator).argsort(-1)[..., :slots]
    holes = torch.rand(batch, heads, slots, generator=generator).argsort(-1)[..., :empty]
    return index.scatter(-1, holes, -1)


def part_of(query_index: Index, key_index: Index) -> SegmentPart:
    return SegmentPart(1, 1, 1, 1, query_index=query_index, key_index=key_index)


INDICES = {
    "shared": (some_index(1, 1, 37, 21, empty=3), some_index(1, 1, 37, 33, empty=2, seed=1)),
    "by head": (some_index(1, 4, 37, 37, empty=0), some_index(1, 4, 37, 9, empty=4, seed=1)),
    "by sequence": (some_index(2, 1, 37, 37, empty=9), some_index(2, 4, 37, 21, empty=1, seed=1)),
    "queries alone": (some_index(2, 4, 37, 20, empty=1), slice(3, 20)),
    "keys alone": (None, some_index(1, 1, 37, 20, empty=1)),
    "nothing": (slice(2, 30), None),
}


@pytest.mark.parametrize(
    ("d", "dtype"), [(16, torch.float32), (80, torch.bfloat16), (128, torch.float16), (136, torch.float32)], ids=str
)
@pytest.mark.parametrize("case", list(INDICES))
def test_gathered_rows_are_those_of_the_index(case: str, d: int, dtype: torch.dtype) -> None:
    n = 37
    query_index, key_index = INDICES[case]
    q, out, grad = (guarded(draw(2, 4, n, d, seed=s, dtype=dtype)) for s in range(3))
    k = draw(2, n, 2, d, seed=3, dtype=dtype).transpose(1, 2)  # as models store it
    v = torch.zeros(2 * 2 * n * d + 1, dtype=dtype)[1:].view(2, 2, n, d).copy_(draw(2, 2, n, d, seed=4))  # not aligned
    out = torch.zeros(2, 4, n, d + 1, dtype=dtype)[..., :d].copy_(out)  # rows of no 16-byte multiple
    lse = draw(2, 4, n, seed=5)
    part = part_of(query_index, key_index)
    wanted = [
        take(q, query_index), take(k, key_index), take(v, key_index), take(out, query_index), take(grad, query_index),
        take(lse.unsqueeze(-1), query_index).squeeze(-1),
    ]  # fmt: skip
    for count in (0, 3):
        found = gather(part, q, k, v, *(out, grad, lse)[:count])
        assert len(found) == 3 + count
        for ours, theirs in zip(found, wanted, strict=False):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


PLANS = {
    "one reordered": [part_of(some_index(1, 4, 37, 21, empty=3), None)],
    "shared, then by sequence": [
        part_of(some_index(1, 1, 37, 30, empty=3), None), part_of(some_index(2, 1, 37, 37, empty=5, seed=1), None),
    ],
    "whole, run, by head": [
        part_of(None, None), part_of(slice(5, 20), None), part_of(some_index(2, 4, 37, 21, empty=3), None),
        part_of(slice(36, 37), None),
    ],
    "runs": [part_of(slice(1, 37), None), part_of(slice(0, 12), None)],
    "more than a launch takes": [
        part_of(some_index(1, 4, 37, 20 + seed, empty=2, seed=seed), None) for seed in range(2 * MOST_PARTS)
    ],
}  # fmt: skip


def slots_in(index: Index, length: int) -> int:
    if index is None:
        return length
    return index.stop - index.start if isinstance(index, slice) else index.shape[2]


@pytest.mark.parametrize(("d", "dtype"), [(16, torch.float32), (80, torch.bfloat16), (136, torch.float16)], ids=str)
@pytest.mark.parametrize("case", list(PLANS))
def test_merged_rows_are_one_softmax(case: str, d: int, dtype: torch.dtype) -> None:
    """Against ``merge_into`` in fp64, from results that never see the positions in no slot."""
    n, query = 37, draw(2, 4, 37, d, dtype=dtype)
    merging = KernelMerging(TRITON, query, None)
    out, lse = torch.zeros(2, 4, n, d, dtype=torch.float64), torch.full((2, 4, n), -torch.inf, dtype=torch.float64)
    for seed, part in enumerate(PLANS[case]):
        index = part.query_index
        slots = slots_in(index, n)
        part_out, part_lse = draw(2, 4, slots, d, seed=seed, dtype=dtype), 3 * draw(2, 4, slots, seed=seed + 100)
        no_key = draw(2, 4, slots, seed=seed + 200) > 1
        part_out, part_lse = part_out.masked_fill(no_key[..., None], 0), part_lse.masked_fill(no_key, -torch.inf)
        merging.add(Piece.of_all(part), part_out, part_lse)
        merge_into(out, lse, part_out.double(), part_lse.double(), index)
    found, found_lse = merging.result()
    assert found.dtype == dtype
    assert found_lse.dtype == torch.float32
    empty = torch.isneginf(lse)
    assert torch.equal(torch.isneginf(found_lse), empty)
    assert not found[empty].any()
    assert float((found_lse - lse)[~empty].abs().max()) < 2e-6
    # One rounding of the output; the interpreter cuts to bfloat16 instead, which is twice the error.
    assert error(found, out) < {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 5e-3}[dtype]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("d", "dtype"), [(16, torch.float32), (80, torch.bfloat16), (136, torch.float16)], ids=str)
@pytest.mark.parametrize("case", list(PLANS))
def test_summed_rows_are_the_adjoint_of_gathering(case: str, d: int, dtype: torch.dtype, kv_heads: int) -> None:
    """Keys of ``kv_heads`` heads, whose gradients come per query head where an index is by head."""
    n, key = 37, draw(2, kv_heads, 37, d, dtype=dtype)
    total, again = (KernelTotal(TRITON, key, key, key, ScoreOptions(1.0)) for _ in range(2))
    wanted = torch.zeros(key.shape, dtype=torch.float64)
    for seed, part in enumerate(PLANS[case]):
        index = part.query_index
        heads = index.shape[1] if isinstance(index, Tensor) and index.shape[1] > 1 else kv_heads
        grad = draw(2, heads, slots_in(index, n), d, seed=seed, dtype=dtype)
        add_slots(wanted, grad.double(), index)
        for each in (total, again):
            each.add_rows(1, grad, index, Piece.of_all(part), repeated=False)
    found = total.sum_of(1)
    assert found.dtype == dtype
    assert torch.equal(found, again.sum_of(1))
    assert not found[wanted == 0].any()
    assert error(found, wanted) < {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 5e-3}[dtype]


def test_a_key_in_many_parts_of_a_plan() -> None:
    """Whole plans of gathered parts and others, forward and backward, under grouped queries and empty slots."""
    n = 29
    query_index, key_index = some_index(1, 4, n, 23, empty=3), some_index(1, 4, n, 20, empty=2, seed=1)
    shared = some_index(2, 1, n, n, empty=4, seed=2)
    plan: list[Part] = [
        SegmentPart(23, 20, 6, 5, query_index=query_index, key_index=key_index), OffsetsPart(n, ((0, 1, 5),)),
        SegmentPart(n, n, 4, 4, Band(None, 0), query_index=shared, key_index=shared),
        SegmentPart(2, n, 2, n, query_index=slice(3, 5)),
    ]  # fmt: skip
    for parts in (plan, plan[:1], plan[2:3], plan * 3):
        assert_exact(parts, n_q=n, batch=2, heads=4, kv_heads=2, d=24)
    chunk = SegmentPart(12, 20, 4, 6, query_index=some_index(1, 4, 12, 12, empty=1), key_index=key_index)
    assert_exact([chunk, SegmentPart(7, n, 7, n, query_index=slice(5, 12))], n_q=12, n_k=n, heads=4, kv_heads=2)


def test_indices_of_a_kept_plan_are_worked_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("sa_hf.ops.triton.launch_rows.invert_kernel", Counted(launch_rows.invert_kernel, made))
    index = some_index(1, 1, 30, 24, empty=3)
    part = SegmentPart(24, 24, 6, 6, query_index=index, key_index=index)
    assert_exact(part, n_q=30)
    assert len(made) == 2  # by the forward and by the backward, there for query and key
    examine_slots([part])
    assert_exact(part, n_q=30)
    assert_exact(part, n_q=30)
    assert len(made) == 3


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(grid)
        return self.kernel[grid]
