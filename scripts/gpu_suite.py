"""The GPU suite in one command: parity of every kernel with the fp64 oracle, then speed against the best there is.

    python scripts/gpu_suite.py                 # on a GPU; about 9 minutes, resumable
    python scripts/gpu_suite.py --dry-run       # all of it at toy sizes on the CPU
    python scripts/gpu_suite.py --roofline      # the paper table alone (no GPU): floors that a GPU run has to meet
    python scripts/gpu_suite.py --tune          # sweep tiles, warps and stages, write the kernels' configuration table

It writes JSON and a Markdown table to model_cards/results/ after every row. Sections come in order of priority and end
with the budget. Where a pattern's parity failed, no speed-up is printed for it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=9.0, help="minutes of wall time (default 9)")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, kernels under the interpreter")
    parser.add_argument("--roofline", action="store_true", help="write the paper roofline table and stop")
    parser.add_argument("--tune", action="store_true", help="sweep launch configurations before the timing")
    parser.add_argument("--only", default="", help="sections to run, comma separated (parity,forward,backward,...)")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run already has")
    parser.add_argument("--out", type=Path, default=ROOT / "model_cards" / "results", help="folder of the result files")
    return parser.parse_args()


def roofline_table(out: Path) -> Path:
    """The paper table: work, floor and the time that the tiles should take, per pattern and length."""
    from sa_hf.tools.bench.cases import describe, timing_cases
    from sa_hf.tools.bench.report import Report
    from sa_hf.tools.bench.roofline import H200_DATASHEET, work

    header = {
        "title": "Paper roofline (predictions, nothing here was run on a GPU)",
        "ceilings": f"{H200_DATASHEET.name}: {H200_DATASHEET.tflops:.0f} TFLOP/s bf16, "
        f"{H200_DATASHEET.memory_gbs:.0f} GB/s; L2 taken as {H200_DATASHEET.l2_gbs:.0f} GB/s",
        "shape": "batch 1, 16 heads, D = 128, bf16, tiles of 64",
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


def main() -> int:
    deadline_from = time.monotonic()
    args = arguments()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    import torch

    from sa_hf.tools.bench.report import Report, machine
    from sa_hf.tools.bench.roofline import Ceilings
    from sa_hf.tools.bench.suite import (
        Suite,
        data_parity_section,
        decode_section,
        dense_section,
        flex_section,
        model_section,
        option_parity_section,
        option_section,
        parity_section,
        speed_section,
    )
    from sa_hf.tools.bench.timing import copy_bandwidth, l2_bandwidth, matmul_rate

    if args.roofline:
        print(f"wrote {roofline_table(args.out)}")
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "no CUDA device here: use --dry-run (toy sizes on the CPU) or --roofline (the paper table)", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if args.dry_run else "cuda")
    name = "dry_run" if args.dry_run else "gpu_" + torch.cuda.get_device_name(device).lower().replace(" ", "_")
    header = {"title": f"GPU suite: {name}", **machine(device), "command": "python scripts/gpu_suite.py"}
    report = Report(args.out / f"{name}.json", header, fresh=args.fresh)
    if not args.dry_run and torch.version.hip is None:
        from sa_hf.tools.bench.precompile import precompile

        major, minor = torch.cuda.get_device_capability(device)
        report.add("compilation", "all kernels", precompile(10 * major + minor, tune=args.tune))
    if args.tune:
        from sa_hf.ops.triton.tune import tune

        print(f"wrote {tune(device, dry_run=args.dry_run)}")
    size, gib = (256, 0.01) if args.dry_run else (8192, 2.0)
    dtype = torch.float32 if args.dry_run else torch.bfloat16
    ceilings = Ceilings(
        str(header["device"]), matmul_rate(device, dtype, size), copy_bandwidth(device, gib),
        l2_bandwidth(device, 1.0 if args.dry_run else 16.0),
    )  # fmt: skip
    suite = Suite(device, args.dry_run, deadline_from + 60 * args.budget, report, ceilings)
    report.add(
        "ceilings",
        "measured",
        {"TFLOP/s": ceilings.tflops, "GB/s": ceilings.memory_gbs, "L2 GB/s": ceilings.l2_gbs},
    )
    long = [64] if args.dry_run else [16384]
    more = [] if args.dry_run else [4096, 65536, 2048, 8192, 32768, 131072]
    dims = [16] if args.dry_run else [128, 64]
    sections: dict[str, Callable[[], None]] = {
        "parity": lambda: parity_section(suite),
        "parity options": lambda: option_parity_section(suite),
        "parity data": lambda: data_parity_section(suite),
        "dense": lambda: dense_section(suite, long, dims),
        "ours": lambda: speed_section(suite, long, dims),
        "options": lambda: option_section(suite, long[0]),
        "decode": lambda: decode_section(suite, [64] if args.dry_run else [65536, 524288]),
        "training": lambda: model_section(suite),
        "flex": lambda: flex_section(suite, [] if args.dry_run else long),
        "dense lengths": lambda: dense_section(suite, more, dims),
        "ours lengths": lambda: speed_section(suite, more, dims),
    }
    wanted = [s for s in args.only.split(",") if s]
    for section, run in sections.items():
        if not wanted or section.split()[0] in wanted:
            run()
    report.save()
    failed = [k for k, r in report.rows("parity").items() if r.get("pass") is not True]
    errors = [f"{s}/{k}" for s, rows in report.data["sections"].items() for k, r in rows.items() if "error" in r]
    print(f"wrote {report.path.with_suffix('.md')}; parity failures: {failed or 'none'}; errors: {errors or 'none'}")
    return 1 if failed or (args.dry_run and errors) else 0


if __name__ == "__main__":
    raise SystemExit(main())
