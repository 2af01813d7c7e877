"""The interpreter gate: every kernel against the fp64 oracle, on the CPU, in processes of their own.

Whether triton interprets is decided when it is first imported, for the whole process: here it must stay undecided.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa_hf.ops.triton.device import why_not

FOLDER = Path(__file__).parent / "kernels"


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("name", sorted(p.name for p in FOLDER.glob("test_*.py")))
def test_kernels_match_the_oracle(name: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER / name)],
        env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
