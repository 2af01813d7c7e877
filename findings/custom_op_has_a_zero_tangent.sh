#!/usr/bin/env bash
# torch 2.13.0: an operator made by torch.library.custom_op with register_autograd has no forward mode, and torch.func.jvp
# does not say so: its tangent is zero, and what is added to it is all that is left.
# Seen: jvp of sin(x) + x at 0 in direction 1: 1 by the operator, 2 is right; no error, no warning.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import warnings

import torch


@torch.library.custom_op("finding::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


sine.register_autograd(lambda ctx, grad: grad * ctx.saved_tensors[0].cos(), setup_context=setup)
x = torch.zeros(())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    _, ours = torch.func.jvp(lambda x: sine(x) + x, (x,), (torch.ones(()),))
_, right = torch.func.jvp(lambda x: x.sin() + x, (x,), (torch.ones(()),))
said = [str(w.message) for w in caught if "finding" in str(w.message) or "tangent" in str(w.message)]
print(f"tangent {float(ours)}, right is {float(right)}; warnings that name it: {said}")
assert float(ours) == 1 and float(right) == 2 and not said, "the behaviour has changed"
PY
