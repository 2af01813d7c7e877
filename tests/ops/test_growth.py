"""Time and memory grow with the kept blocks: the sizes of all tensors that the engine makes are counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import window_part
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sa_hf.ops.choice import choose_engine
from sa_hf.ops.parts import Band, OffsetsPart, Part, ScoreOptions, SegmentPart
from sa_hf.ops.run import plan_backward, plan_forward

pytestmark = pytest.mark.usefixtures("cpu_path")

PLANS = {
    "blocks": lambda n: [window_part(n, Band(40, 0))],
    "one segment, window": lambda n: [SegmentPart(n, n, n, n, band=Band(40, 0))],
    "segments": lambda n: [SegmentPart(n, n, 64, 64)],
    "offsets": lambda n: [OffsetsPart(n, ((0, 1, 2, 4, 8),))],
    "global rows": lambda n: [SegmentPart(2, n, 2, n, query_index=slice(0, 2))],
}
OPTIONS = {
    "plain": ScoreOptions(scale=0.25),
    "softcap": ScoreOptions(scale=0.25, softcap=2.0),
    "dropout": ScoreOptions(scale=0.25, dropout=0.1, seed=torch.tensor(3)),
}


class Sizes(TorchDispatchMode):
    """Elements of every tensor made (views aside) and of the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                size = x.untyped_storage().nbytes() // x.element_size()
                self.total += size
                self.largest = max(self.largest, size)
        return result


def sizes(plan: list[Part], n: int, options: ScoreOptions) -> Sizes:
    q, k, v, g = (torch.randn(1, 2, n, 16) for _ in range(4))
    engine = choose_engine("native", q, options)
    with torch.no_grad(), Sizes() as counted:
        out, lse = plan_forward(plan, q, k, v, options, engine)
        plan_backward(plan, q, k, v, out, lse, g, options, engine)
    return counted


@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("name", list(PLANS))
def test_growth_is_linear(name: str, option: str) -> None:
    short, long = (sizes(PLANS[name](n), n, OPTIONS[option]) for n in (2048, 8192))
    assert long.total < 4.6 * short.total
    # Nothing near n x n: the largest tensor is one of the inputs' size, or a batch of tiles of fixed size.
    assert long.largest <= max(2 * 8192 * 64, 2**20)


def test_the_counter_sees_a_quadratic_tensor() -> None:
    def dense(n: int) -> int:
        q = torch.randn(n, 16)
        with Sizes() as counted:
            torch.softmax(q @ q.T, -1)
        return counted.total

    assert dense(1024) > 14 * dense(256)
