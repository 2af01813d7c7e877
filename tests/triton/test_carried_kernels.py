"""The kernels that a checkpoint carries compile for a GPU, from the folder alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from sa_hf import patch_model
from sa_hf.ops.triton.device import why_not

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Arguments: the checkpoint, and record.py, which a checkpoint does not carry and which needs triton alone.
COMPILE = """
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget

folder = Path(sys.argv[1])
sys.modules["sa_hf"] = None  # the folder must serve alone
sys.path.insert(0, str(folder.parent))
files = [import_module(f"{folder.name}.{path.stem}") for path in sorted(folder.glob("sa_hf_*.py"))]
spec = spec_from_file_location("record", sys.argv[2])
sys.modules["record"] = record = module_from_spec(spec)
spec.loader.exec_module(record)


class Carried:
    def __getattr__(self, name):
        return next(getattr(file, name) for file in files if hasattr(file, name))


it = Carried()
N, HEADS = 4096, 4
engine, plain = it.TritonEngine(), it.ScoreOptions(scale=0.1)
q = torch.zeros(1, HEADS, N, 64, dtype=torch.bfloat16)
k = torch.zeros(1, 2, N, 64, dtype=torch.bfloat16)
order = torch.arange(N).flip(0)[None, None]
plan = [
    it.BlockPart(it.build_layout(lambda h, i, j: ((i - j).abs() < 33) | (j < 7), N, N, heads=1)),
    it.SegmentPart(N, N, 64, 64, query_index=order, key_index=order),
    it.OffsetsPart(N, ((0, 1, 2),)),
]
with record.record_launches(GPUTarget("cuda", 90, 32)) as recorded:
    for options in (plain, it.ScoreOptions(scale=0.1, distance_bias=torch.zeros(HEADS, 2 * N - 1))):
        parts = plan if options is plain else plan[:1]
        out, lse = it.plan_forward(parts, q, k, k, options, engine)
        it.plan_backward(parts, q, k, k, out, lse, q, options, engine)
    it.decode(q[:, :, :1], k, k, torch.zeros(1, 1, 1, N, dtype=torch.int64), plain)
compiled = {}
for kernel in recorded:
    if kernel.name not in compiled:
        assert "wgmma" in kernel.compile().asm["ptx"] or kernel.name != "forward_kernel"
        compiled[kernel.name] = Path(kernel.function.fn.__code__.co_filename).parent
for name, place in compiled.items():
    print(name, place == folder)
"""


def test_the_kernels_of_a_checkpoint_compile(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes))
    folder = tmp_path / "checkpoint"
    patch_model(model, "bigbird", block_size=16).save_pretrained(folder)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder), str(ROOT / "sa_hf" / "ops" / "triton" / "record.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    sources = "".join(path.read_text() for path in (ROOT / "sa_hf" / "ops" / "triton").glob("*.py"))
    every = re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", sources, re.MULTILINE)
    assert len(every) > 10
    assert sorted(result.stdout.splitlines()) == sorted(f"{name} True" for name in every)
