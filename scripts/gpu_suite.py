"""The GPU suite in one command: parity of every kernel with the fp64 oracle, then speed against the best there is.

    python scripts/gpu_suite.py                 # on a GPU; about 9 minutes, resumable
    python scripts/gpu_suite.py --dry-run       # all of it at toy sizes on the CPU
    python scripts/gpu_suite.py --roofline      # the paper table alone (no GPU): floors that a GPU run has to meet
    python scripts/gpu_suite.py --tune          # sweep tiles, warps and stages, write the kernels' configuration table

On a machine that is lent for ten minutes a command, and that gives back one folder:

    python3 scripts/gpu_suite.py --out "$OUT"
    python3 scripts/gpu_suite.py --out "$OUT" --tune        # its table comes back as tuned.json
    python3 scripts/gpu_suite.py --out "$OUT" --resume model_cards/results      # go on with what came back earlier

JSON and a Markdown table are written to --out after every row. Sections come in order of priority and end with the
budget; no row starts that could end after it. A run goes on with the rows of the same code, card, torch and triton,
and tries again those that failed, but for those in which the device itself failed (the program then starts anew and
passes over them) and those that never ended. Where a pattern's parity failed, no speed-up is printed for it.

``ms`` is a call as its user has it, the host's launches included; ``ms in a graph`` the device alone, by replay of a
CUDA graph. Each has a speed-up of its own, over the dense attention that is the fastest measured in the same way.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sa_hf.tools.bench.report import Report
    from sa_hf.tools.bench.suite import Suite

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Sections = dict[str, Callable[[], None]]

COMPILE_SHARE = 0.35  # of the time left: what is missing then compiles where it is first used
RESTART_SECONDS = 60.0  # a restart with less time left would measure nothing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--budget", type=float, default=9.0, help="minutes until the last row ends (default 9)")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, kernels under the interpreter")
    parser.add_argument("--roofline", action="store_true", help="write the paper roofline table and stop")
    parser.add_argument("--tune", action="store_true", help="sweep launch configurations before the timing")
    parser.add_argument("--only", default="", help="sections to run, comma separated (parity,dense,ours,decode,...)")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run already has")
    parser.add_argument("--out", type=Path, default=ROOT / "model_cards" / "results", help="folder of the result files")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run's files (default: --out)")
    return parser.parse_args()


def interpreter_problem() -> str | None:
    """Why the kernels cannot be interpreted here, or None."""
    try:
        triton, numpy = version("triton"), version("numpy")
    except PackageNotFoundError as error:
        return f"--dry-run runs the kernels under Triton's interpreter, and {error.name} is not installed"
    if first_two(triton) >= (3, 7) or first_two(numpy) < (2, 4):
        return None
    return (
        f"--dry-run cannot run here: the interpreter of triton {triton} fails with numpy {numpy} "
        "('only 0-dimensional arrays can be converted to Python scalars'); "
        "install 'numpy<2.4' or 'triton>=3.7'. The kernels on a GPU are not affected"
    )


def first_two(number: str) -> tuple[int, int]:
    major, minor = number.split(".")[:2]
    return int(major), int(minor)


def roofline_table(out: Path) -> Path:
    """The paper table: work, floor and the time that the tiles should take, per pattern and length."""
    from sa_hf.tools.bench.cases import describe, timing_cases
    from sa_hf.tools.bench.report import Report
    from sa_hf.tools.bench.roofline import H200_DATASHEET, work

    header = {
        "title": "Paper roofline (predictions, nothing here was run on a GPU)",
        "ceilings": f"{H200_DATASHEET.name}: {H200_DATASHEET.tflops:.0f} TFLOP/s bf16, "
        f"{H200_DATASHEET.memory_gbs:.0f} GB/s; L2 taken as {H200_DATASHEET.l2_gbs:.0f} GB/s",
        "shape": "batch 1, 16 heads, D = 128, bf16, tiles of 64; segments of 128 where those fit",
        "command": "python scripts/gpu_suite.py --roofline",
    }
    report = Report(out / "roofline_paper.json", header, fresh=True)
    for length in (2048, 8192, 16384, 32768, 65536, 131072):
        for case in timing_cases():
            w = work(
                case.config, length, causal=case.causal, batch=1, num_heads=16, num_key_value_heads=16, head_dim=128
            )
            dense_pairs = 16 * (length * (length + 1) // 2 if case.causal else length * length)
            report.rows("work and floors")[f"{case.key}/n{length}"] = {
                "config": describe(case.config),
                "kept of dense": w.pairs / dense_pairs,
                "executed / kept": w.executed_pairs / w.pairs,
                "GFLOP fwd": w.flops_forward / 1e9,
                "MB fwd": w.bytes_forward / 1e6,
                "floor fwd ms": w.floor_ms(H200_DATASHEET),
                "floor bwd ms": w.floor_ms(H200_DATASHEET, backward=True),
                "tiles fwd ms": w.tile_ms(H200_DATASHEET, 128),
                "measured": "not measured",
            }
    report.save()
    return report.path.with_suffix(".md")


def header(device: torch.device) -> dict[str, Any]:
    """What the rows were measured on; see ``report.SAME`` for what has to agree for them to be gone on with."""
    from sa_hf.ops.triton.configs import TUNED
    from sa_hf.tools.bench.report import code_digest, digest, machine

    table = Path(os.environ.get("SA_HF_TRITON_CONFIGS", TUNED))
    return {
        "title": f"GPU suite: {result_name(device)}",
        **machine(device),
        "code": code_digest(),
        "launches": f"{table.name} {digest([table], table.parent)}" if table.exists() else "as shipped",
        "command": 'python3 scripts/gpu_suite.py --out "$OUT"',
        "figures": "ms is a call, the host's launches included; ms in a graph the device alone, by replay of a CUDA "
        "graph; speed-ups compare calls with calls and graphs with graphs; rates are of the device's time",
    }


def result_name(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        return "dry_run"
    return "gpu_" + torch.cuda.get_device_name(device).lower().replace(" ", "_")


def prepare(args: argparse.Namespace, device: torch.device, deadline: float, report: Report) -> None:
    """Compile all kernels ahead and, where asked for, tune; neither ends the run, but for a device that fails."""
    import torch

    from sa_hf.ops.triton.tune import tune
    from sa_hf.tools.bench.precompile import precompile
    from sa_hf.tools.bench.report import STARTED
    from sa_hf.tools.bench.restart import DeviceLost, device_error, first_line
    from sa_hf.tools.bench.timing import device_ms

    def attempt(section: str, step: Callable[[], dict[str, Any]]) -> None:
        report.add(section, "all kernels", {"error": STARTED})
        try:
            row = step()
        except Exception as error:
            row = {"error": first_line(error)}
        lost = device_error(device)
        report.add(section, "all kernels", row if lost is None else {"error": lost, "fatal": True})
        print(f"{section}: {row}", flush=True)
        if lost is not None:
            raise DeviceLost(f"{section}: {lost}")

    def compiled(tuning: bool) -> None:
        if device.type == "cuda" and torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(device)
            until = time.monotonic() + COMPILE_SHARE * (deadline - time.monotonic())
            attempt("compilation", lambda: precompile(10 * major + minor, tune=tuning, until=until))

    def tuned() -> dict[str, Any]:
        budget = min(240.0, 0.4 * (deadline - time.monotonic()))
        table = tune(device, device_ms, dry_run=args.dry_run, budget=budget, copy=args.out / "tuned.json")
        return {"table": str(table), "copy": str(args.out / "tuned.json")}

    compiled(args.tune)
    if args.tune:
        args.out.mkdir(parents=True, exist_ok=True)
        attempt("tuning", tuned)
        compiled(False)  # the launches that were chosen, for all the other variants of their kernels
        report.head(header(device), keep=("compilation", "tuning"))  # rows of other launches are of no use


def measured_ceilings(device: torch.device, dry: bool) -> dict[str, float]:
    import torch

    from sa_hf.tools.bench.timing import copy_bandwidth, l2_bandwidth, matmul_rate

    size, gib, mib = (256, 0.01, 1.0) if dry else (8192, 2.0, 16.0)
    return {
        "TFLOP/s": matmul_rate(device, torch.float32 if dry else torch.bfloat16, size),
        "GB/s": copy_bandwidth(device, gib),
        "L2 GB/s": l2_bandwidth(device, mib),
    }


def sections(suite: Suite) -> Sections:
    """What is measured, the most valuable first; ``--only`` goes by the first word of a name."""
    from sa_hf.tools.bench import rows_kernels, rows_others, rows_parity, rows_speed
    from sa_hf.tools.bench.cases import FLEX_BLOCK, FLEX_OTHER_BLOCK

    long = 64 if suite.dry else 16384
    more = [] if suite.dry else [4096, 65536, 2048, 8192, 32768, 131072]
    dims = [16] if suite.dry else [128, 64]
    flex = [] if suite.dry else [long]  # FlexAttention and the profiler are of the GPU alone
    found: Sections = {}

    def add_length(length: int) -> None:  # of use with both
        found[f"dense {length}"] = lambda: rows_speed.dense_section(suite, [length], dims)
        found[f"ours {length}"] = lambda: rows_speed.speed_section(suite, [length], dims)

    found |= {
        "parity": lambda: rows_parity.parity_section(suite),
        "parity options": lambda: rows_parity.option_parity_section(suite),
        "parity data": lambda: rows_parity.data_parity_section(suite),
        "dense": lambda: rows_speed.dense_section(suite, [long], dims),
        "ours": lambda: rows_speed.speed_section(suite, [long], dims),
        "kernels": lambda: rows_kernels.kernel_section(suite, flex, dims),
        "options": lambda: rows_speed.option_section(suite, long),
        "decode": lambda: rows_speed.decode_section(suite, [64] if suite.dry else [65536, 524288]),
        "flex": lambda: rows_others.flex_section(suite, flex, FLEX_BLOCK, passes=(True,)),
    }
    for length in more[:1]:
        add_length(length)
    found |= {
        "training": lambda: rows_speed.model_section(suite),
        "parity rest": lambda: rows_parity.parity_section(suite, first=False),
        "parity rest of options": lambda: rows_parity.option_parity_section(suite, first=False),
        "parity rest of data": lambda: rows_parity.data_parity_section(suite, first=False),
        "flex forward": lambda: rows_others.flex_section(suite, flex, FLEX_BLOCK, passes=(False,)),
        "hf-bigbird": lambda: rows_others.bigbird_section(suite, [] if suite.dry else [long]),
    }
    for length in more[1:]:
        add_length(length)
    found["flex other"] = lambda: rows_others.flex_section(suite, flex, FLEX_OTHER_BLOCK, passes=(False,))
    return found


def main() -> int:
    begin = time.monotonic()
    args = arguments()
    if args.roofline:
        print(f"wrote {roofline_table(args.out)}")
        return 0
    if args.dry_run:
        problem = interpreter_problem()
        if problem is not None:
            print(problem, file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print(
            "no CUDA device here: use --dry-run (toy sizes on the CPU) or --roofline (the paper table)", file=sys.stderr
        )
        return 2
    from sa_hf.tools.bench.report import Report
    from sa_hf.tools.bench.restart import deadline_before
    from sa_hf.tools.bench.roofline import H200_DATASHEET
    from sa_hf.tools.bench.suite import Suite

    device = torch.device("cpu" if args.dry_run else "cuda")
    deadline = deadline_before() or begin + 60 * args.budget
    file = f"{result_name(device)}.json"
    resume = None if args.resume is None else args.resume / file
    report = Report(args.out / file, header(device), fresh=args.fresh, resume=resume)
    suite = Suite(device, args.dry_run, deadline, report, H200_DATASHEET)  # until its own are measured
    measure_all(args, suite)
    return conclude(args, suite)


def measure_all(args: argparse.Namespace, suite: Suite) -> None:
    """Everything in turn, and again in a new process where the device failed."""
    from sa_hf.tools.bench.restart import DeviceLost, deadline_before, restart
    from sa_hf.tools.bench.roofline import Ceilings

    try:
        if deadline_before() is None:  # what was compiled before a restart lies on disk
            prepare(args, suite.device, suite.deadline, suite.report)
        measured = measured_ceilings(suite.device, args.dry_run)
        suite.report.add("ceilings", "measured", measured)
        suite.ceilings = Ceilings(suite.report.path.name, *measured.values())
        for name, run in sections(suite).items():
            if not args.only or name.split()[0] in args.only.split(","):
                run()
    except DeviceLost as lost:
        print(f"the device failed in {lost}", flush=True)
        if suite.deadline - time.monotonic() > RESTART_SECONDS:
            restart(suite.deadline)


def conclude(args: argparse.Namespace, suite: Suite) -> int:
    """Compare what was measured, say what is missing, and return the exit status."""
    from sa_hf.tools.bench.compare import renew_speed_ups

    report = suite.report
    renew_speed_ups(suite)
    report.save()
    failed = [k for k, r in report.rows("parity").items() if r.get("pass") is not True]
    errors = [f"{s}/{k}" for s, rows in report.data["sections"].items() for k, r in rows.items() if "error" in r]
    if suite.left_out:
        print(f"no time for {suite.left_out} rows: run again with --resume {args.out}")
    if given_up := report.given_up():
        print(f"not tried again, since the device failed in them or they never ended: {given_up}")
    print(f"wrote {report.path.with_suffix('.md')}; parity failures: {failed or 'none'}; errors: {errors or 'none'}")
    return 1 if failed or (args.dry_run and errors) else 0


if __name__ == "__main__":
    raise SystemExit(main())
