"""Whether two builds of sa_hf are equally fast on this CPU, called in turn within one run.

    python scripts/same_speed.py --against REV            # this checkout and a git revision
    python scripts/same_speed.py --against REV --only bigbird --length 8192 --rounds 15

Each build runs in a process of its own, of which only one computes at a time: in every round both are asked for one
call (forward and backward) of each row, first the one, then the other, in the next round the other way round. A row's
ratio is the median over the rounds of that round's ratio, with the quartiles beside it, so that what slows the machine
for a while slows both. A run of one build against itself (``--against HEAD`` in a clean checkout) shows the noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from same_outputs import ROOT, worktree

HEADS, HEAD_DIM = 8, 64
OPERATOR: dict[str, dict[str, Any]] = {
    "dense": {},
    "sliding_window": {},
    "longnet": {},
    "logsparse": {},
    "sparse_transformer": {"kind": "fixed"},
    "bigbird": {},
    "star": {},
}
MODELS: dict[str, dict[str, Any]] = {
    "sparsebert": {"mask_length": 512},
    "expire_span": {"max_span": 512},
    "routing": {"num_clusters": 32},
}


def operator_call(name: str, options: dict[str, Any], length: int) -> Callable[[], object]:
    """One forward and backward of the bare operator; causal where the pattern can be."""
    from sa_hf import available_patterns, sparse_attention

    config = available_patterns()[name](**options)
    made = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, generator=made).requires_grad_() for _ in range(3)]

    def call() -> None:
        out = sparse_attention(*inputs, config, causal=name != "star")
        torch.autograd.grad(out, inputs, out.detach())

    return call


def model_call(name: str, options: dict[str, Any], length: int) -> Callable[[], object]:
    """One step, without an optimizer's, of a patched Llama of one layer."""
    import transformers

    from sa_hf import patch_model

    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=HEADS,
        max_position_embeddings=length, pad_token_id=0,
    )  # fmt: skip
    model = patch_model(transformers.LlamaForCausalLM(config), name, **options).train()
    ids = torch.randint(1, 64, (1, length))

    def call() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    return call


def serve(length: int, threads: int) -> None:
    """A build's process: for each line that names a row, call it once and say the seconds."""
    torch.set_num_threads(threads)
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in calls:
            make, options = (operator_call, OPERATOR) if name in OPERATOR else (model_call, MODELS)
            calls[name] = make(name, options[name], length)
            calls[name]()  # compiles, and fills what is kept
        start = time.perf_counter()
        calls[name]()
        print(f"seconds {time.perf_counter() - start}", flush=True)


class Build:
    """A checkout, served by a process of its own."""

    def __init__(self, tree: Path, length: int, threads: int) -> None:
        words = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        words += ["--length", str(length), "--threads", str(threads)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, text=True)

    def seconds(self, row: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(row, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"the process of a build ended at {row}")

    def stop(self) -> None:
        self.process.communicate()


def compare(one: Build, other: Build, rows: list[str], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of both builds, by row and round, called in turn."""
    found: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for at in range(rounds):
        for row in rows:
            if at % 2:
                b, a = other.seconds(row), one.seconds(row)
            else:
                a, b = one.seconds(row), other.seconds(row)
            found[row].append((a, b))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="HEAD", help="a git revision (default HEAD: the noise)")
    parser.add_argument("--only", nargs="*", default=[*OPERATOR, *MODELS], choices=[*OPERATOR, *MODELS], help="rows")
    parser.add_argument("--length", type=int, default=4096, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.length, args.threads)
        return 0
    with worktree(args.against) as tree:
        here, there = (Build(x, args.length, args.threads) for x in (ROOT, tree))
        try:
            found = compare(here, there, args.only, args.rounds)
        finally:
            here.stop()
            there.stop()
    print(f"{args.length} tokens, {args.threads} threads, {args.rounds} rounds, forward and backward, fp32")
    print(f"| row | here, s | {args.against}, s | here / {args.against} | quartiles |\n|---|---|---|---|---|")
    for row, pairs in found.items():
        a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
        low, middle, high = statistics.quantiles([x / y for x, y in pairs], n=4)
        print(f"| {row} | {a:.4f} | {b:.4f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
