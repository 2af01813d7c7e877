"""A kernel's key in Triton's cache on disk does not depend on what its process did before."""

from __future__ import annotations

import subprocess
import sys

KEYS = """
import sys
from sa_hf.ops.triton import backward, forward

first = [forward.forward_step, backward.score_gradient, backward.tile_probabilities] if sys.argv[1] == "helpers" else []
for function in [*first, backward.key_kernel, backward.query_kernel, forward.forward_kernel]:
    key = function.cache_key
print(*[x.cache_key for x in (forward.forward_kernel, backward.query_kernel, backward.key_kernel)])
"""


def keys(order: str) -> str:
    result = subprocess.run([sys.executable, "-c", KEYS, order], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_keys_are_the_same_in_every_process() -> None:
    """Callees' keys made before their callers' or after: what one process compiled, another finds.

    Triton 3.6 gives other keys without ``common.settle_keys``; 3.9 does not."""
    assert keys("kernels") == keys("helpers") != ""
