"""The compile gate: every shipped kernel compiled ahead of time, for GPUs that are not there.

    python scripts/compile_gate.py              # every kernel x configuration x option, sm_80 and sm_90; the table
    python scripts/compile_gate.py --quick      # the reduced set of CI
    python scripts/compile_gate.py --targets sm_100,gfx942

The launchers of the Triton engine run as on the real device up to the moment of compilation; what they would compile is
compiled here. Registers, spills, shared memory, resident blocks, the matrix instruction with its width and the 16-byte
asynchronous copies are read from the binary and checked by class of kernel. The full run writes
model_cards/results/compile_table.json and .md. Compiled kernels stay in Triton's own cache, keyed by their source.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sa_hf.ops.layout import build_layout  # noqa: E402
from sa_hf.ops.parts import BlockPart, OffsetsPart, ScoreOptions, SegmentPart  # noqa: E402

LENGTH, HEADS, KV_HEADS = 256, 4, 2
OPTIONS = ("plain", "softcap", "bias", "spans", "dropout", "gathered", "all")
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per SM that blocks can use
BLOCK_SIZES = ("BLOCK_Q", "BLOCK_K", "BLOCK", "ROWS", "TILES")
# Some launches that an H100 measured as the fastest keep a few addresses in local memory (dQ at head_dim 128: 271 us
# with 64 columns and 80 bytes, 301 us with 32 and none; dK/dV there 620 us with three stages and 3 accesses in a loop
# of 266 instructions, 674 us with two; dK/dV at head_dim 256: 1,719 us with 8 accesses, 2,024 us without). Times:
# model_cards/results/kernels_h100.md.
MEASURED_SPILL, MEASURED_LOOP_SPILLS = 96, 8
LIST_CASES = ("block/D128/bfloat16/plain", "block/D64/bfloat16/all")


@dataclass(frozen=True)
class Case:
    """One call of the engine: a family of kernels at a head_dim, a dtype and a set of options."""

    family: str
    head_dim: int
    dtype: str
    options: str = "plain"
    tile: int = 64

    @property
    def label(self) -> str:
        return f"{self.family}/D{self.head_dim}/{self.dtype}/{self.options}" + (
            f"/tile{self.tile}" if self.tile != 64 else ""
        )


def all_cases() -> Iterator[Case]:
    # fp32 shares the 16-bit kernels' code at other tiles: its plain and its fullest form bound the rest.
    for dtype, chosen in (("bfloat16", OPTIONS), ("float32", ("plain", "all"))):
        for head_dim in (64, 128, 256):
            for options in chosen:
                yield Case("block", head_dim, dtype, options)
            for options in ("plain", "all"):
                yield Case("offsets", head_dim, dtype, options)
            for options in ("plain", "bias", "spans"):
                yield Case("decode", head_dim, dtype, options)
            yield Case("rows", head_dim, dtype)
    for head_dim in (64, 128):
        yield Case("block", head_dim, "bfloat16", "plain", 128)
    for head_dim in (16, 80, 136, 192):
        yield Case("block", head_dim, "bfloat16", "plain")
        yield Case("rows", head_dim, "bfloat16")
    yield Case("block", 128, "float16", "plain")


def quick_cases() -> Iterator[Case]:
    yield Case("block", 128, "bfloat16", "plain")
    yield Case("block", 64, "bfloat16", "all")
    yield Case("offsets", 64, "bfloat16", "plain")
    yield Case("decode", 128, "bfloat16", "plain")
    yield Case("rows", 128, "bfloat16")
    yield Case("rows", 80, "bfloat16")


def score_options(name: str) -> ScoreOptions:
    options, every = ScoreOptions(scale=0.125), name == "all"
    if every or name == "softcap":
        options = replace(options, softcap=30.0)
    if every or name == "bias":
        options = replace(options, distance_bias=torch.zeros(HEADS, 2 * LENGTH - 1))
    if every or name == "spans":
        options = replace(options, spans=torch.zeros(2, 1, LENGTH))
    if every or name == "dropout":
        options = replace(options, dropout=0.1, seed=torch.tensor(1))
    return options


def run_case(case: Case) -> None:
    """Call the engine as a user's model would; under ``record_launches`` nothing is computed."""
    from sa_hf.ops.triton import TritonEngine
    from sa_hf.ops.triton.launch_decode import decode

    dtype = getattr(torch, case.dtype)
    gathered = case.options in ("gathered", "all")
    query = torch.zeros(2, HEADS, LENGTH, case.head_dim, dtype=dtype)
    key = torch.zeros(2, HEADS if gathered else KV_HEADS, LENGTH, case.head_dim, dtype=dtype)
    options = score_options(case.options)
    if case.family == "rows":
        run_rows(query, key)
        return
    if case.family == "decode":
        index = torch.zeros(1, 1, 1, LENGTH, dtype=torch.int64)
        decode(query[:, :, :1], key, key, index, options)
        return
    order = torch.arange(LENGTH).expand(1, HEADS, LENGTH) if gathered else None
    part: BlockPart | OffsetsPart
    if case.family == "offsets":
        part = OffsetsPart(LENGTH, ((0, 1, 2, 4),), query_index=order, key_index=order)
    else:
        layout = build_layout(
            lambda h, i, j: ((i - j).abs() < 33) | (j % 7 == 0), LENGTH, LENGTH, heads=1, block=case.tile
        )  # fmt: skip
        part = BlockPart(layout, order, order)
    engine = TritonEngine()
    out, lse = engine.forward(part, query, key, key, options)
    engine.backward(part, query, key, key, out, lse, query, options)


def run_rows(query: torch.Tensor, key: torch.Tensor) -> None:
    """Gather both sides, and bring the slots of as many parts as fit one launch back to positions."""
    from sa_hf.ops.triton.launch_rows import SlotRows, gather, merge, sum_rows
    from sa_hf.ops.triton.rows import MOST_PARTS

    index = torch.arange(LENGTH).expand(1, HEADS, LENGTH)
    part = SegmentPart(LENGTH, LENGTH, 64, 64, query_index=index, key_index=index)
    lse = torch.zeros(query.shape[:3])
    q, k, *_ = gather(part, query, key, key, query, query, lse)
    merge([SlotRows(q, index if at % 2 else None, lse) for at in range(MOST_PARTS)], query, query.dtype)
    sum_rows([SlotRows(k, index)] * MOST_PARTS, key, key.dtype)


def compile_case(case: Case, target: str) -> list[dict[str, Any]]:
    """The rows of a case on a target (``sm_90`` or ``gfx942``); one that does not compile is a row with the error."""
    from triton.backends.compiler import GPUTarget

    from sa_hf.ops.triton.record import record_launches

    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    with record_launches(gpu) as recorded:
        run_case(case)
    rows = []
    for kernel in recorded:
        if kernel.name in ("prepare_kernel", "combine_kernel") and case.options != "plain":
            continue
        # Lists know nothing of head_dim and dtype: once by row and by column, once by diagonal.
        if kernel.name == "list_kernel" and case.label not in LIST_CASES:
            continue
        blocks = {k: v for k, v in constants(kernel).items() if k in BLOCK_SIZES}
        row = {
            "kernel": kernel.name.removesuffix("_kernel"), "case": case.label, "target": target,
            "blocks": blocks, "warps": kernel.options["num_warps"], "stages": kernel.options["num_stages"],
        }  # fmt: skip
        try:
            compiled = kernel.compile()
        except Exception as error:  # any compiler failure is a finding of the gate, whatever its class
            rows.append(row | {"problems": [f"does not compile: {str(error)[-200:]}"]})
            continue
        row |= amd_figures(compiled) if target.startswith("gfx") else cuda_figures(compiled, int(target[3:]), row)
        rows.append(row | {"problems": problems(row, constants(kernel))})
    return rows


def constants(kernel: Any) -> dict[str, Any]:
    """Compile-time constants by name (Triton keys them by argument place)."""
    names = kernel.function.arg_names
    return {names[k[0]] if isinstance(k, tuple) else k: v for k, v in kernel.constants.items()}


def cuda_figures(compiled: Any, arch: int, row: dict[str, Any]) -> dict[str, Any]:
    import triton

    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool.with_name("nvdisasm"), "-c", file.name], capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    registers, shared, warps = found["REG"], compiled.metadata.shared, row["warps"]
    # Registers are handed out per warp in steps of 256; each block keeps 1 KB of shared memory for the system.
    per_block = -(-registers * 32 // 256) * 256 * warps
    resident = min(REGISTERS // per_block, THREADS // (32 * warps), BLOCKS, SHARED[arch] // (shared + 1024))
    widths = [int(n) for n in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k", ptx)]
    return {
        "registers": registers, "spill bytes": max(found["STACK"], found["LOCAL"]),
        "spills in the loop": loop_spills(code), "shared bytes": shared,
        "blocks per SM": resident, "wgmma": len(widths), "wgmma width": max(widths, default=0),
        "mma": len(re.findall(r"\bmma\.sync", ptx)), "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "16-byte copies": len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)),
        "16-byte stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
        "16-byte loads": len(re.findall(r"ld\.global\.v4\.b32", ptx)),
    }  # fmt: skip


def loop_spills(code: str) -> int:
    """Loads and stores of spilled registers in the loop over full tiles: the first loop with matrix instructions of a
    kernel's SASS."""
    lines = code.splitlines()
    places = {found.group(1): at for at, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    for at, line in enumerate(lines):
        back = re.search(r"BRA.*\((\.L_x_\d+)\)", line)
        if back and places.get(back.group(1), at) < at:
            body = "\n".join(lines[places[back.group(1)] : at])
            if re.search(r"\b[HQ]G?MMA\b", body):
                return len(re.findall(r"\b(?:LDL|STL)\b", body))
    return 0


def amd_figures(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return {
        "registers": number("vgpr_count"), "spill bytes": 4 * number("vgpr_spill_count"),
        "shared bytes": compiled.metadata.shared, "mfma": len(re.findall(r"v_mfma", text)),
    }  # fmt: skip


def problems(row: dict[str, Any], constant: dict[str, Any]) -> list[str]:
    """What a row breaks of the rules of its class of kernel."""
    found = []
    half = "float16" in row["case"]
    matrix = row["kernel"] in ("forward", "query", "key", "bias", "decode")
    if half and not row["target"].startswith("gfx"):
        measured = row["target"] == "sm_90"
        if row["spills in the loop"] > (MEASURED_LOOP_SPILLS if measured else 0):
            found.append(f"{row['spills in the loop']} spills in the loop over full tiles")
        if row["spill bytes"] > (MEASURED_SPILL if measured else 0):
            found.append(f"spills {row['spill bytes']} bytes")
    if row["target"] == "sm_90" and half and matrix and row["kernel"] != "decode":
        rows = row["blocks"]["BLOCK_K" if row["kernel"] == "key" else "BLOCK_Q"] if "BLOCK" not in row["blocks"] else 0
        if rows >= 64:
            # Warp groups beyond those that the rows fill share the columns of the product.
            share = max(1, row["warps"] // 4 // (rows // 64))
            wanted = max(constant["D0"] // share, 8)
            if row["mma"] or row["wgmma width"] < wanted:
                found.append(
                    f"matrix instruction is wgmma n{row['wgmma width']} (wanted n{wanted}), {row['mma']} mma.sync"
                )
    if (
        row["kernel"] in ("forward", "query")
        and half
        and row["target"] in ("sm_80", "sm_90")
        and not row["16-byte copies"]
    ):
        found.append("no 16-byte asynchronous copies")
    moves = row["kernel"] in ("gather", "merge_parts", "sum_parts") and not row["target"].startswith("gfx")
    if moves and not (row["16-byte loads"] and row["16-byte stores"]):
        found.append("no 16-byte loads and stores of rows")
    if row.get("blocks per SM") == 0:
        found.append("no block fits an SM")
    return found


def markdown(rows: list[dict[str, Any]], versions: str) -> str:
    """The table, one line per kernel."""
    head = [
        "target",
        "kernel",
        "case",
        "tile",
        "warps",
        "stages",
        "registers",
        "spill",
        "in the loop",
        "shared KB",
        "blocks/SM",
        "matrix",
        "16 B copies",
    ]
    lines = [
        "# Compiled kernels", "",
        f"`python scripts/compile_gate.py`, {versions}. Read from the binaries; speed is not measured here.",
        "fp32 kernels (ieee precision, no matrix units) may spill. 16-bit ones may not; on sm_90, where a launch was",
        f"measured as the fastest, up to {MEASURED_SPILL} bytes, with {MEASURED_LOOP_SPILLS} accesses in the loop over",
        "full tiles.", "",
        "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
    ]  # fmt: skip
    for r in rows:
        matrix = (
            f"wgmma n{r['wgmma width']} x{r['wgmma']}" if r.get("wgmma") else f"mma x{r['mma']}" if r.get("mma") else ""
        )
        matrix = matrix or (
            f"tcgen05 x{r['tcgen05']}" if r.get("tcgen05") else f"mfma x{r['mfma']}" if r.get("mfma") else "-"
        )
        cells = [
            r["target"], r["kernel"], r["case"], "x".join(map(str, r["blocks"].values())), r["warps"], r["stages"],
            r.get("registers", "-"), r.get("spill bytes", "-"), r.get("spills in the loop", "-"),
            round(r.get("shared bytes", 0) / 1024), r.get("blocks per SM", "-"), matrix, r.get("16-byte copies", "-"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the reduced set of CI; writes nothing")
    parser.add_argument("--targets", default="sm_90,sm_80", help="comma separated (default sm_90,sm_80)")
    parser.add_argument("--only", default="", help="cases whose label holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--out", type=Path, help="folder for the table (default: model_cards/results of a full run)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    import triton

    cases = [c for c in (quick_cases() if args.quick else all_cases()) if args.only in c.label]
    jobs = [(case, target) for target in args.targets.split(",") for case in cases]
    with ProcessPoolExecutor(args.jobs) as pool:
        results = pool.map(compile_case, *zip(*jobs, strict=True))
        rows = []
        for (case, target), found in zip(jobs, results, strict=True):
            rows += found
            for row in found:
                for problem in row["problems"]:
                    print(f"PROBLEM {target} {row['kernel']} {case.label}: {problem}", flush=True)
            print(f"{target} {case.label}: {len(found)} kernels", flush=True)
    versions = f"triton {triton.__version__}"
    whole = not args.quick and not args.only
    folder = args.out or (ROOT / "model_cards" / "results" if whole else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compile_table.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
        (folder / "compile_table.md").write_text(markdown(rows, versions))
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {bad} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
