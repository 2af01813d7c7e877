"""What the C++ engine makes asks Linux for large pages, read from the kernel's own list of the process's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ops_cases import window_part
from test_cpu_kernels import PLAIN, draw

from sa_hf.ops import memory
from sa_hf.ops.choice import CPP
from sa_hf.ops.parts import Band
from sa_hf.ops.run import plan_backward, plan_forward

MAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(
    memory.LARGE_PAGES is None or not MAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="no large pages on this system",
)


def asks(x: torch.Tensor) -> bool:
    """Whether the middle of a tensor lies in memory for which large pages were asked (``hg`` in proc(5), VmFlags)."""
    middle, inside = x.data_ptr() + x.nbytes // 2, False
    for line in MAPS.read_text().splitlines():
        word = line.split()[0]
        if "-" in word:
            low, high = (int(bound, 16) for bound in word.split("-"))
            inside = low <= middle < high
        elif inside and word == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.parametrize("make", [memory.large_empty, memory.large_zeros])
def test_large_tensors_ask_and_small_ones_do_not(make) -> None:  # type: ignore[no-untyped-def]  # two of one signature
    # Beyond what malloc takes from its heap, whose neighbours may have asked: each has a mapping of its own.
    large = make(2**24)
    assert asks(large)
    assert not asks(torch.empty(2**24))
    assert make is memory.large_empty or not large.any()
    assert make(3, 5, dtype=torch.bfloat16).shape == (3, 5)


@pytest.mark.skipif(CPP.unsupported(torch.zeros(1, 1, 1, 16), PLAIN) is not None, reason="no compiled kernels")
def test_results_and_gradients_ask() -> None:
    n = 5000
    query, key, value = (draw(2, 8, n, 128, seed=seed) for seed in range(3))
    plan = [window_part(n, Band(3, 0))]
    out, lse = plan_forward(plan, query, key, value, PLAIN, CPP)
    grads = plan_backward(plan, query, key, value, out, lse, value, PLAIN, CPP)
    assert not asks(query)
    assert all(asks(x) for x in (out, grads.query, grads.key, grads.value))
