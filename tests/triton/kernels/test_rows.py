"""The row kernels under the interpreter: against the torch path of ``ops.slots``, and whole plans against fp64."""

from __future__ import annotations

import pytest
import torch
from parity import guarded
from torch import Tensor

from sa_hf.ops.parts import Index, SegmentPart
from sa_hf.ops.slots import take
from sa_hf.ops.triton.launch_rows import gather

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
