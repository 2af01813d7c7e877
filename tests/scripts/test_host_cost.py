"""What a call costs the host without a GPU: the script that measures it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa_hf.ops.triton.device import why_not

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_first_launch_comes_before_the_end_of_each_pass() -> None:
    words = [sys.executable, str(ROOT / "scripts" / "host_cost.py"), "--child", "--calls", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"longnet", "logsparse", "bigbird", "star"} < set(rows)
    for name, (first, whole, first_back, whole_back) in rows.items():
        assert 0 < first < whole, name
        assert 0 < first_back < whole_back, name
