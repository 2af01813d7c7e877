#!/usr/bin/env bash
# triton 3.5.1 (what torch 2.9 brings), TRITON_INTERPRET=1, numpy 2.4.6: a kernel that loops over a range with a loaded bound
# raises a TypeError of numpy about arrays and scalars. With numpy 2.3.5 it runs, as with triton 3.6 and newer.
# Seen: TypeError: only 0-dimensional arrays can be converted to Python scalars.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 triton==3.5.1 numpy==2.4.6
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
def total(x, count, out):
    n = tl.load(count)
    s = 0.0
    for i in range(0, n):
        s += tl.load(x + i)
    tl.store(out, s)
"""
with open("kernel.py", "w") as file:  # the interpreter reads a kernel from its file
    file.write(source)
spec = importlib.util.spec_from_file_location("kernel", "kernel.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules["kernel"] = kernel
spec.loader.exec_module(kernel)
out = torch.zeros(1)
try:
    kernel.total[(1,)](torch.ones(8), torch.tensor([5], dtype=torch.int32), out)
    said = f"ran: {out.item()}"
except Exception as error:
    said = f"{type(error).__name__}: {error} / {type(error.__cause__).__name__}: {error.__cause__}"
print(said)
assert "only 0-dimensional arrays" in said, "the behaviour has changed"
PY
