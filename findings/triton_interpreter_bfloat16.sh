#!/usr/bin/env bash
# triton 3.7.1, TRITON_INTERPRET=1: bfloat16 arithmetic in a kernel gives numbers without any meaning and no error, where
# float16 is right: a dot product, and even x * x + x. (Casting to float32 first is right.)
# Seen: float16 off by its own rounding, bfloat16 off by 1e10 and more.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import importlib.util
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import torch

source = """
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))
"""
with open("kernel.py", "w") as file:  # the interpreter reads a kernel from its file
    file.write(source)
spec = importlib.util.spec_from_file_location("kernel", "kernel.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules["kernel"] = kernel
spec.loader.exec_module(kernel)
torch.manual_seed(0)
error = {}
for dtype in (torch.float16, torch.bfloat16):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    kernel.product[(1,)](a, b, c, 16)
    error[dtype] = float((c.double() - a.double() @ b.double()).abs().max())
    print(f"{dtype}: the product is {error[dtype]:.2g} off")
assert error[torch.float16] < 1e-2 and not error[torch.bfloat16] < 1e3, "the behaviour has changed"
PY
