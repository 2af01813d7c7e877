"""FSDP2: learned state is sharded with the layers, and read where its layer does not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_gradients_of_sharded_sparse_state() -> None:
    script = Path(__file__).with_name("fsdp_gradients.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
