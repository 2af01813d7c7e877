#!/usr/bin/env bash
# torch 2.13.0: once_differentiable promises an error where a function is differentiated twice. A gradient penalty raises
# none where another path leads to the same input, by torch.autograd.grad or backward(): the function's part is left out.
# Seen: the derivative of (3x^2 + 2x)^2 at 1 comes out as 20 where 80 is right, without an error.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0] ** 2


def penalty(cube):
    x = torch.ones((), requires_grad=True)
    (slope,) = torch.autograd.grad(cube(x) + x**2, x, create_graph=True)
    return slope**2, x


value, x = penalty(lambda x: x**3)
(right,) = torch.autograd.grad(value, x)
value, x = penalty(Cube.apply)
(silent,) = torch.autograd.grad(value, x)
value, x = penalty(Cube.apply)
value.backward()
print(f"by torch.autograd.grad {float(silent)}, by backward() {float(x.grad)}, right is {float(right)}")
assert float(silent) == float(x.grad) == 20 and float(right) == 80, "the behaviour has changed"
PY
