"""The compile gate, reduced, and the kernels' identity over lengths; both in processes where triton really compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa_hf.ops.triton.device import why_not

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Every kernel that three kinds of parts and a decode step call, over lengths, batches, heads and strides: how many
# distinct compiled entries each would be.
COUNT_KERNELS = """
import json
import torch
from triton.backends.compiler import GPUTarget

from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import Band, BlockPart, OffsetsPart, ScoreOptions, SegmentPart
from sa_hf.ops.run import plan_backward, plan_forward
from sa_hf.ops.triton import TritonEngine
from sa_hf.ops.triton.launch_decode import decode
from sa_hf.ops.triton.record import record_launches

engine, options = TritonEngine(), ScoreOptions(scale=0.1)


def window(n):
    tiles = -(-n // 64)
    some = torch.tensor([[0, t, s] for t in range(tiles) for s in range(tiles) if t == 0 or s == 0 or t - s in (0, 1)])
    return BlockPart(build_layout(
        lambda h, i, j: i >= 0 * j, n, n, heads=1, band=Band(5000, None), full_tiles=some
    ))


parts = {
    "block": window,
    "segment": lambda n: SegmentPart(n, n, 64, 64, Band(None, 0)),
    "offsets": lambda n: OffsetsPart(n, ((0, 1, 2),)),
}
counts = {}
for name, part_of in parts.items():
    with record_launches(GPUTarget("cuda", 90, 32)) as recorded:
        for n in (1, 16, 17, 4096, 4097):
            for batch, heads, kv_heads in ((1, 2, 1), (3, 4, 2)):
                # Slices of a fused projection: strides that differ from the shape's.
                fused = torch.zeros(batch, n, heads + 2 * kv_heads, 64, dtype=torch.bfloat16).transpose(1, 2)
                q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
                part = part_of(n)
                out, lse = engine.forward(part, q, k, v, options)
                engine.backward(part, q, k, v, out, lse, q, options)
                if name == "block":
                    decode(q[:, :, :1], k, v, torch.zeros(1, 1, 1, n, dtype=torch.int64), options)
    for kernel in recorded:
        counts[f"{name} {kernel.name}"] = counts.get(f"{name} {kernel.name}", 0) + 1
order = lambda n: torch.arange(n).flip(0)[None, None]
with record_launches(GPUTarget("cuda", 90, 32)) as recorded:
    for n in (1, 16, 17, 4096, 4097):
        for batch, heads, kv_heads in ((1, 2, 1), (3, 4, 2)):
            q = torch.zeros(batch, n, heads, 64, dtype=torch.bfloat16).transpose(1, 2)
            k = torch.zeros(batch, kv_heads, n, 64, dtype=torch.bfloat16)
            gathered = SegmentPart(n, n, 64, 64, query_index=order(n), key_index=order(n))
            plan = [gathered, OffsetsPart(n, ((0, 1, 2),)), SegmentPart(1, n, 1, n, query_index=slice(n - 1, n))]
            out, lse = plan_forward(plan, q, k, k, options, engine)
            plan_backward(plan, q, k, k, out, lse, q, options, engine)
for kernel in recorded:
    if kernel.name in ("gather_kernel", "merge_parts_kernel", "sum_parts_kernel", "invert_kernel"):
        counts[f"plan {kernel.name}"] = counts.get(f"plan {kernel.name}", 0) + 1
print(json.dumps(counts))
"""


# What a second call of LongNet launches, kernels and operators of torch, forward and backward.
COUNT_LAUNCHES = """
import json
import torch
import triton
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from sa_hf import LongNetAttentionConfig
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.run import plan_backward, plan_forward
from sa_hf.ops.triton import TritonEngine
from sa_hf.ops.triton.record import record_launches
from sa_hf.layer import Geometry
from sa_hf.patterns.custom_op import cached_plan

WITHOUT_LAUNCH = {"empty", "promote_types", "slice", "view"}
config = LongNetAttentionConfig(segment_length=(64, 128, 256), dilated_ratio=(1, 2, 4))
plan = cached_plan(config, Geometry(256, 256, (0, 1, 2, 3), 4, 0, True), torch.device("cpu"))
engine, options = TritonEngine(), ScoreOptions(scale=0.1)
q, k = torch.zeros(2, 4, 256, 64, dtype=torch.bfloat16), torch.zeros(2, 2, 256, 64, dtype=torch.bfloat16)
launches = Counter()


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        launches[function.overloadpacket.__name__] += function.overloadpacket.__name__ not in WITHOUT_LAUNCH
        return function(*args, **(kwargs or {}))


def launched(*, fn, **rest):
    launches[fn.name.rsplit(".", 1)[-1]] += 1
    return True


def counted(call):
    launches.clear()
    with Operators():
        result = call()
    return +launches, result


with record_launches(GPUTarget("cuda", 90, 32)):
    triton.knobs.runtime.jit_cache_hook = launched
    for _ in range(2):
        forward, (out, lse) = counted(lambda: plan_forward(plan, q, k, k, options, engine))
        backward, _ = counted(lambda: plan_backward(plan, q, k, k, out, lse, q, options, engine))
print(json.dumps([forward, backward]))
"""


def run(arguments: list[str], timeout: int) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_a_new_length_is_not_a_new_kernel() -> None:
    result = run(["-c", COUNT_KERNELS], 300)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    # Pieces are combined by log-sum-exp or by a sum (dQ, dK, dV); lists are made by row and by column.
    for name in ("combine_kernel", "list_kernel"):
        assert counts.pop(f"block {name}") == counts.pop(f"segment {name}") == 2
    block = ("forward_kernel", "prepare_kernel", "query_kernel", "key_kernel")
    expected = [f"{part} {name}" for part in ("block", "segment") for name in block]
    expected += ["block decode_kernel", "block merge_kernel", "offsets prepare_kernel"]
    expected += [f"offsets offsets_{name}_kernel" for name in ("forward", "query", "key")]
    expected += [f"plan {name}_kernel" for name in ("merge_parts", "sum_parts", "invert")]
    assert counts.pop("plan gather_kernel") == 2  # the backward brings more rows along
    assert counts == dict.fromkeys(expected, 1)


def test_a_plan_of_gathered_parts_launches_little_beside_attention() -> None:
    """The first branch is in order; the others are gathered, and all are merged, or summed, once."""
    result = run(["-c", COUNT_LAUNCHES], 300)
    assert result.returncode == 0, result.stderr[-3000:]
    forward, backward = json.loads(result.stdout.splitlines()[-1])
    assert forward == {"gather_kernel": 2, "forward_kernel": 3, "merge_parts_kernel": 1}
    attention = dict.fromkeys(("prepare_kernel", "query_kernel", "key_kernel"), 3)
    assert backward == {"gather_kernel": 2, "sum_parts_kernel": 3, **attention}


PRECOMPILE = """
import os
import torch
import triton
from triton.backends.compiler import GPUTarget

from sa_hf.ops.parts import OffsetsPart, ScoreOptions
from sa_hf.ops.triton import TritonEngine, record
from sa_hf.tools.bench.precompile import _share

cache = os.environ["TRITON_CACHE_DIR"]
compiled, failed, _ = _share(0, 200, 90, True)
assert compiled > 1 and not failed, (compiled, failed)

# What was compiled ahead is what a call on the device would look for: it compiles nothing anew.
x = torch.zeros(1, 2, 64, 16, dtype=torch.bfloat16)
call = lambda: TritonEngine().forward(OffsetsPart(64, ((0, 1),)), x, x, x, ScoreOptions(1.0))
with record.record_launches(GPUTarget("cuda", 90, 32)) as recorded:
    call()
recorded[0].compile()
before = sorted(os.listdir(cache))
triton.runtime.driver.set_active(record._Driver(GPUTarget("cuda", 90, 32)))
try:
    call()
except AttributeError:  # the stand-in cannot launch
    pass
assert sorted(os.listdir(cache)) == before
"""


def test_the_suite_compiles_ahead_what_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = run(["-c", PRECOMPILE], 300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_compile_gate() -> None:
    """Both architectures and one AMD target; ``scripts/compile_gate.py`` without ``--quick`` is the whole of it."""
    targets = "sm_80,sm_90,gfx942" if os.environ.get("CI") else "sm_90"
    result = run(["scripts/compile_gate.py", "--quick", "--targets", targets], 900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
