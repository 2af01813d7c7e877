"""What a call costs the host before the GPU has anything to do, measured without a GPU: launches do nothing.

    python scripts/host_cost.py                  # this checkout
    python scripts/host_cost.py --against REV    # and a git revision, round by round in turn

Triton's engine runs on small CPU tensors under a stand-in driver, and a kernel's launch returns at once: what is left
is Python, torch's bookkeeping and allocations. Of each pattern, medians in microseconds: from the call to the first
launch, and to the end of the call; the same of the backward. Triton's own launcher, some 10 to 20 us a kernel on a real
device, is not in it. Absolute figures are those of this machine's host; compare the two columns of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LENGTH, HEADS, HEAD_DIM = 512, 8, 64
PATTERNS: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 128},
    "longnet": {"segment_length": [128, 256, 512], "dilated_ratio": [1, 2, 4]},
    "logsparse": {},
    "sparse_transformer": {"kind": "fixed", "stride": 32},
    "bigbird": {},
    "star": {},
}
STEPS = ("forward, first launch", "forward, whole", "backward, first launch", "backward, whole")


@contextmanager
def launches_noted() -> Iterator[Callable[[], float | None]]:
    """Inside, kernels' launches do nothing but note when they came; gives the first since the last question. For a
    process of its own: what is replaced stays so."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from sa_hf.ops.triton import engine
    from sa_hf.ops.triton.record import record_launches

    first: list[float] = []

    def run(*_: Any, **__: Any) -> None:
        if not first:
            first.append(time.perf_counter())

    def asked() -> float | None:
        found = first[0] if first else None
        first.clear()
        return found

    JITFunction.run = run
    engine._machine_reason = lambda device: None
    with record_launches(GPUTarget("cuda", 90, 32)):  # its stand-in driver says which GPU there is
        yield asked


def measured(calls: int) -> dict[str, list[float]]:
    """Medians in microseconds of ``STEPS`` by pattern, of the build on the path."""
    from sa_hf import available_patterns

    rows = {}
    with launches_noted() as asked:
        for name, options in PATTERNS.items():
            fields = {key: tuple(x) if isinstance(x, list) else x for key, x in options.items()}
            rows[name] = pattern_times(name, available_patterns()[name](**fields), asked, calls)
    return rows


def pattern_times(name: str, config: Any, asked: Callable[[], float | None], calls: int) -> list[float]:
    import torch

    from sa_hf import sparse_attention

    inputs = [torch.zeros(1, HEADS, LENGTH, HEAD_DIM, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    upstream = torch.zeros(1, HEADS, LENGTH, HEAD_DIM, dtype=torch.bfloat16)
    found: list[list[float]] = [[] for _ in STEPS]
    for number in range(calls + 10):
        times = []
        asked()
        start = time.perf_counter()
        out = sparse_attention(*inputs, config, causal=name != "star", engine="triton")
        end = time.perf_counter()
        times += [asked(), end]
        begin = time.perf_counter()
        torch.autograd.grad(out, inputs, upstream)
        end = time.perf_counter()
        times += [asked(), end]
        for step, (at, origin) in enumerate(zip(times, (start, start, begin, begin), strict=True)):
            if number >= 10 and at is not None:
                found[step].append((at - origin) * 1e6)
    return [statistics.median(values) for values in found]


def of_build(tree: Path, calls: int) -> dict[str, list[float]]:
    """:func:`measured` in a process of its own, with the package of a checkout."""
    words = [sys.executable, str(Path(__file__).resolve()), "--child", "--calls", str(calls)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree} failed:\n{done.stderr[-3000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def median_rows(rounds: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {
        name: [statistics.median(one[name][at] for one in rounds) for at in range(len(STEPS))] for name in rounds[0]
    }


def table(ours: dict[str, list[float]], other: dict[str, list[float]] | None) -> str:
    lines = ["| pattern | " + " | ".join(f"{step}, us" for step in STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for name, values in ours.items():
        cells = [
            f"{value:.0f}" + (f" ({value / other[name][at]:.2f} of {other[name][at]:.0f})" if other else "")
            for at, value in enumerate(values)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a git revision, measured in turn")
    parser.add_argument("--calls", type=int, default=200, help="calls of each pattern and process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each build")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.calls)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "other"
        if args.against:
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, args.against], cwd=ROOT, check=True)
        try:
            ours, others = [], []
            for _ in range(args.rounds):
                ours.append(of_build(ROOT, args.calls))
                if args.against:
                    others.append(of_build(tree, args.calls))
        finally:
            if args.against:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    against = f"; in brackets the ratio to {args.against}" if args.against else ""
    print(f"bf16, batch 1, {HEADS} heads of {HEAD_DIM}, {LENGTH} tokens, medians of {args.rounds} processes{against}\n")
    print(table(median_rows(ours), median_rows(others) if others else None))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
