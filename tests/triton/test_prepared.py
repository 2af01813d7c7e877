"""A prepared launch hands the kernel what Triton's own call would, and takes another kernel where that would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa_hf.ops.triton.device import why_not

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# A stand-in GPU: kernels are bound and specialised as on a real one, "compiled" into notes of their calls.
STAND_IN = """
import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

calls, bound = [], []


class Noted(CompiledKernel):
    def __init__(self, source, **_):
        self.src, self.name, self.module, self.function = source, source.fn.__name__, object(), object()
        self.packed_metadata = self._run = None

    @property
    def run(self):
        return lambda x, y, z, stream, function, meta, launch, enter, leave, *arguments: calls.append(
            (self.name, (x, y, z), function, arguments))

    def launch_metadata(self, *_):
        return None

    def _init_handles(self):
        pass


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


triton.compiler.compile = lambda source, target, options: Noted(source)
triton.runtime.driver.set_active(Driver())

from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import Band, BlockPart, OffsetsPart, ScoreOptions, SegmentPart
from sa_hf.ops.triton import TritonEngine, launch, lists

launch_by_triton = triton.JITFunction.run


def counted(self, *arguments, **options):
    bound.append(self.fn.__name__)
    return launch_by_triton(self, *arguments, **options)


triton.JITFunction.run = counted
engine = TritonEngine()


def notes():
    found = [
        (name, grid, function, [(tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments])
        for name, grid, function, arguments in calls if name != "list_kernel"
    ]
    calls.clear()
    return found


def both(part, n, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, **options):
    q = torch.zeros(2, n, heads, dim, dtype=dtype).transpose(1, 2)
    k, v = (torch.zeros(2, kv_heads, n, dim, dtype=dtype) for _ in range(2))
    options = ScoreOptions(0.1, **options)
    out, lse = engine.forward(part, q, k, v, options)
    engine.backward(part, q, k, v, out, lse, out, options)
    return notes()
"""

SAME_ARGUMENTS = """
def window(n):
    tiles = -(-n // 64)
    some = torch.tensor([[0, t, s] for t in range(tiles) for s in range(tiles) if t == 0 or s == 0 or t - s in (0, 1)])
    return BlockPart(build_layout(lambda h, i, j: i >= 0 * j, n, n, heads=1, band=Band(5000, None), full_tiles=some))


def options_of(n):
    return [
        {}, {"softcap": 5.0}, {"distance_bias": torch.zeros(4, 2 * n - 1)}, {"spans": torch.ones(2, 1, n), "ramp": 3.0},
        {"dropout": 0.25, "seed": torch.tensor(7)},
    ]


functions = {}
parts = [window, lambda n: SegmentPart(n, n, 64, 64, Band(None, 0)), lambda n: OffsetsPart(n, ((0, 1, 2),))]
for number, part_of in enumerate(parts):
    for n in (80, 2000):
        part = part_of(n)
        for which, options in enumerate(options_of(n)):
            bound.clear()
            first = both(part, n, **options)
            assert set(bound) - {"list_kernel"}
            bound.clear()
            again = both(part, n, **options)
            assert not bound, bound  # no longer through Triton's own call
            assert first == again, (part, options)
            assert len(first) >= 4
            # A new length is no new kernel.
            used = {(name, function) for name, _, function, _ in first if name != "combine_kernel"}
            assert functions.setdefault((number, which), used) == used
assert any(name == "combine_kernel" for name, *_ in both(window(2000), 2000))
"""

OTHER_KERNELS = """
from sa_hf.ops.triton.forward import combine_kernel
from sa_hf.ops.triton.launch import Prepared

names = [n for n in combine_kernel.arg_names if not n.endswith("_ptr")]
start = Prepared(combine_kernel, (3, 2), {name: number for number, name in enumerate(names)})


def functions(part, part_lse, lse, times=2):
    for _ in range(times):
        start(part, part_lse, torch.zeros(8, dtype=dtype), lse, torch.zeros(8, dtype=torch.int32))
    assert {grid for _, grid, *_ in calls} == {(3, 2, 1)}
    (found,) = {function for _, _, function, _ in notes()}
    return found


x, dtype = torch.zeros(64), torch.bfloat16
plain = functions(x, x, x)
others = [functions(x[1:], x, x), functions(x, None, None)]  # off a 16-byte boundary; no vectors
dtype = torch.float16
others.append(functions(x, x, x))
assert len({plain, *others}) == 4
dtype = torch.bfloat16
assert functions(x[4:], x, x, 1) is plain
torch.version.hip = "6.0"  # there a kernel also depends on the tensors' sizes: always Triton's own call
start = Prepared(combine_kernel, (3, 2), {name: number for number, name in enumerate(names)})
bound.clear()
functions(x, x, x, 3)
assert len(bound) == 3
"""


@pytest.mark.parametrize("script", [SAME_ARGUMENTS, OTHER_KERNELS], ids=["same_arguments", "other_kernels"])
def test_prepared_launches(script: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", STAND_IN + script], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
