"""CPU benchmark: time and peak memory of dense SDPA, compiled FlexAttention and every sparse pattern.

    python scripts/benchmark.py                       # everything, about an hour on 2 cores
    python scripts/benchmark.py --section speed --length 16384
    python scripts/benchmark.py --quick               # toy sizes, one minute: does it all still run
    SA_HF_CPU_KERNELS=0 python scripts/benchmark.py   # by torch's operators, into benchmark_cpu_torch.*

Times of one table row come from processes that call the contenders in turn; memory from a process of its own per
contender. Results go to ``model_cards/results/benchmark_cpu.{json,md,png}`` as they come.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).resolve().parent.parent / "model_cards" / "results"
SECTIONS = ("speed", "dropout", "memory", "growth", "decode", "training")
PARTS = ("speed", "memory", "growth", "decode", "training")  # of a result file
PARITY = "parity"  # alone: into a known result file, whose other figures, commit and date stay
SPEED_LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
GROWTH_LENGTHS = [2048, 4096, 8192, 16384, 32768, 65536]
# Dense attention with dropout is n x n in memory here: it reaches the first only.
DROPOUT_LENGTHS = [8192, 16384]
TRAINING_LENGTHS = [4096, 8192]  # of whole models
DECODE_LENGTHS = [512, 8192, 32768]  # tokens in the cache
# Of a pattern's error against fp64, relative and root-mean-square: beyond it no speed-up is shown.
LIMITS = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
QUICK_SPEED, QUICK_GROWTH = [128, 256], [128, 256, 512]
DROPOUT = 0.1
# Torch's own switch: its tensors from 2 MB on live in pages of 2 MB, where the system hands those out on request
# (Linux, transparent_hugepage = madvise). Every contender runs under it, into result files of their own.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# The length whose configurations the tables name; strides and clusters grow with the square root of it.
CONFIG_LENGTH = 16384

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    section: Annotated[
        list[str] | None,
        typer.Option(help=f"one or more of {', '.join(SECTIONS)}; default all; or {PARITY} alone, measured anew"),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="lengths in tokens; default 1k to 32k, growth 2k to 64k")
    ] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="row labels; default all")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0 leaves torch's choice")] = 0,
    seconds: Annotated[float, typer.Option(help="measuring time per table row, at least three rounds")] = 15.0,
    dtype: Annotated[
        str, typer.Option(help=f"one of {', '.join(LIMITS)}; all but float32 into benchmark_cpu_<dtype>.*")
    ] = "float32",
    processes: Annotated[
        int, typer.Option(min=1, help="processes per table row of times; the median of their medians counts")
    ] = 1,
    huge_pages: Annotated[
        bool, typer.Option(help=f"tensors in pages of 2 MB ({HUGE_PAGES}=1), into benchmark_cpu_huge_pages.*")
    ] = False,
    name: Annotated[str, typer.Option(help="into benchmark_cpu_<name>*: of another machine, say")] = "",
    quick: Annotated[bool, typer.Option(help="toy sizes, for CI")] = False,
    resume: Annotated[bool, typer.Option(help="keep the rows of the result file, and name both commits")] = False,
    output: Annotated[
        Path, typer.Option(help="folder of the result files", show_default="model_cards/results")
    ] = RESULTS,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure and write the tables."""
    if child is not None:
        print(json.dumps(measure(json.loads(child))))
        return
    from sa_hf.tools.bench.cpu import cpu_cases
    from sa_hf.tools.bench.decoding import decode_cases

    labels = list(dict.fromkeys((*cpu_cases(1024, toy=quick), *decode_cases(1024, toy=quick))))
    check_choices("section", section, (*SECTIONS, PARITY))
    check_choices("pattern", pattern, labels)
    check_choices("dtype", [dtype], LIMITS)
    shared = {
        "threads": threads,
        "toy": quick,
        "seconds": 0.0 if quick else seconds,
        "huge_pages": huge_pages,
        "dtype": dtype,
        "name": check_name(name),
    }
    chosen = [x for x in labels if not pattern or x in pattern]
    bench = Bench(output, shared, chosen, resume, processes, parity_alone=PARITY in (section or ()))
    if PARITY in (section or ()):
        if section != [PARITY]:
            raise typer.BadParameter(f"{PARITY} is measured by every section; alone it measures nothing else")
        bench.parity_anew()
        return
    # Models decode in fp32.
    bench.sections(section or [x for x in SECTIONS if dtype == "float32" or x != "decode"], length)
    bench.draw()
    print(f"wrote {bench.path('json')}, .md and .png")


def check_name(name: str) -> str:
    if not re.fullmatch(r"\w*", name):
        raise typer.BadParameter(f"{name!r} is no word of letters, digits and _", param_hint="--name")
    return name


def check_choices(option: str, values: list[str] | None, choices: Iterable[str]) -> None:
    for value in values or ():
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is none of {sorted(choices)}", param_hint=f"--{option}")


# -- in a process of its own ---------------------------------------------------------------------------------------


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task; what it prints is read by the parent."""
    import torch

    from sa_hf.tools.bench import cpu, decoding, training

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    kind, length, toy, dtype = task["kind"], task["length"], task["toy"], getattr(torch, task["dtype"])
    if kind == "time":
        return cpu.time_side_by_side(
            task["labels"], length, causal=task["causal"], backward=task["backward"], dropout=task["dropout"],
            seconds=task["seconds"], toy=toy, dtype=dtype,
        )  # fmt: skip
    if kind == "memory":
        return cpu.peak_memory(task["label"], length, causal=task["causal"], toy=toy, dtype=dtype)
    if kind == "parity":
        return {label: cpu.parity_error(label, length, toy=toy, dtype=dtype) for label in task["labels"]}
    if kind == "decode":
        return decoding.decode_times(task["label"], length, toy=toy)
    if kind == "step_times":
        return training.step_times(task["model"], task["labels"], length, toy=toy, dtype=dtype)
    if kind == "step_memory":
        return training.step_memory(task["model"], task["label"], length, toy=toy, dtype=dtype)
    return cpu.growth(task["label"], length, toy=toy, dtype=dtype)


class Bench:
    """Starts the measuring processes and keeps the result files up to date."""

    def __init__(
        self, output: Path, shared: dict[str, Any], labels: list[str], resume: bool = False, processes: int = 1,
        parity_alone: bool = False,
    ) -> None:  # fmt: skip
        import torch

        from sa_hf.tools.bench.cases import describe
        from sa_hf.tools.bench.cpu import cpu_cases
        from sa_hf.tools.bench.report import machine

        if shared["threads"]:
            torch.set_num_threads(shared["threads"])
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.shared, self.processes = output, shared, processes
        self.cases = {label: case for label, case in cpu_cases(CONFIG_LENGTH, shared["toy"]).items() if label in labels}
        self.result: dict[str, Any] = {
            "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
            "machine": {
                **machine(torch.device("cpu")), **({HUGE_PAGES: "1"} if shared["huge_pages"] else {}),
                **without_kernels(),
            },
            "shape": f"batch 1, 8 heads, head_dim 64, {SHORT[shared['dtype']]}",
            "configs": {label: describe(case.config) for label, case in self.cases.items()},
            **{part: [] for part in PARTS},
        }  # fmt: skip
        self.labels, earlier = labels, {}
        if resume and self.path("json").exists():
            known = json.loads(self.path("json").read_text())
            commits = [found["machine"].pop("commit") for found in (known, self.result)]
            if known["machine"] != self.result["machine"]:
                raise typer.BadParameter(f"{self.path('json')} is from elsewhere or another day; leave --resume out")
            self.result["machine"]["commit"] = " and ".join(dict.fromkeys(" and ".join(commits).split(" and ")))
            self.result["command"] = f"{known['command']}; {self.result['command']}"
            self.result |= {part: known.get(part, []) for part in PARTS}
            self.result["configs"] = {**known["configs"], **self.result["configs"]}
            earlier = known.get("parity", {})
        if not parity_alone:
            self.result["parity"] = {**earlier, **self.parity()}
            self.sound = [
                label
                for label, error in self.result["parity"].items()
                if error is not None and error < LIMITS[shared["dtype"]]
            ]

    def parity(self) -> dict[str, float | None]:
        """Outputs and gradients against fp64; a pattern that fails, or was not measured, shows no speed-up."""
        return self.run(kind="parity", labels=list(self.cases), length=96 if self.shared["toy"] else 1000)

    def parity_anew(self) -> None:
        """Parity alone into the known result file: the other figures keep their command, commit and date, and parity
        says its own."""
        if not self.path("json").exists():
            raise typer.BadParameter(f"{self.path('json')} is not there; run without --section {PARITY} first")
        known: dict[str, Any] = json.loads(self.path("json").read_text())
        found = {key: self.result["machine"][key] for key in ("device", "torch", "date", "commit")}
        known["parity"] = {**known.get("parity", {}), **self.parity()}
        known["parity_by"] = {"command": self.result["command"], **found}
        self.result = known
        self.save(PARITY)

    def path(self, suffix: str) -> Path:
        kind = f"_{name}" if (name := self.shared.get("name")) else ""
        kind += ("_huge_pages" if self.shared["huge_pages"] else "") + ("_torch" if without_kernels() else "")
        kind += "" if self.shared["dtype"] == "float32" else f"_{self.shared['dtype']}"
        kind += "_quick" if self.shared["toy"] else ""
        return self.output / f"benchmark_cpu{kind}.{suffix}"

    def run(self, **task: Any) -> dict[str, Any]:
        """One task in a process of its own; of a dry run only the first, its figures mean nothing."""
        if self.shared["toy"] and "parity" in self.result:
            return measure({**self.shared, **task})
        command = [sys.executable, __file__, "--child", json.dumps({**self.shared, **task})]
        # Before torch's first allocation, so in the environment.
        environment = {"PYTHONWARNINGS": "ignore", HUGE_PAGES: str(int(self.shared["huge_pages"]))}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        if done.returncode:
            raise RuntimeError(f"{task} failed:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def sections(self, wanted: list[str], lengths: list[int] | None) -> None:
        """Measure the sections that are wanted, at their own lengths where none are named."""
        measures: dict[str, tuple[Callable[[list[int]], None], list[int]]] = {
            "speed": (partial(self.speed, dropout=0.0), SPEED_LENGTHS),
            "dropout": (partial(self.speed, dropout=DROPOUT), DROPOUT_LENGTHS),
            "memory": (self.memory, SPEED_LENGTHS),
            "growth": (self.growth, GROWTH_LENGTHS),
            "decode": (self.decode, DECODE_LENGTHS),
            "training": (self.training, TRAINING_LENGTHS),
        }
        for section, (run, own) in measures.items():
            if section in wanted:
                quick = QUICK_GROWTH if section == "growth" else QUICK_SPEED
                run(lengths or (quick if self.shared["toy"] else own))

    def speed(self, lengths: list[int], dropout: float) -> None:
        for length in lengths:
            for causal in (True, False):
                labels = [x for x, case in self.cases.items() if case.causal == causal and x in self.sound]
                for backward in (False, True) if labels else ():
                    key = {"length": length, "causal": causal, "backward": backward, "dropout": dropout}
                    if (dropout and not backward) or self.has("speed", key):
                        continue
                    found = [self.run(kind="time", labels=labels, **key) for _ in range(self.processes)]
                    self.result["speed"].append({**key, **median_of(found)})
                    self.save(f"speed n={length} causal={causal} backward={backward} dropout={dropout}")

    def memory(self, lengths: list[int]) -> None:
        for length in lengths:
            for causal in (True, False):
                labels = [x for x, case in self.cases.items() if case.causal == causal]
                for label in ["dense", *labels] if labels else ():
                    key = {"length": length, "causal": causal, "label": label}
                    if not self.has("memory", key):
                        self.result["memory"].append({**key, **self.run(kind="memory", **key)})
            self.save(f"memory n={length}")

    def growth(self, lengths: list[int]) -> None:
        for label in self.cases:
            if self.has("growth", {"label": label}):
                continue
            points = [{"length": n, **self.run(kind="growth", label=label, length=n)} for n in lengths]
            fits = {key: exponent(points, key) for key in ("seconds", "mb", "pairs", "formula") if key in points[0]}
            self.result["growth"].append({"label": label, "points": points, "exponents": fits})
            self.save(f"growth {label}")

    def decode(self, lengths: list[int]) -> None:
        from sa_hf.tools.bench.decoding import decode_cases

        for length in lengths:
            for label in decode_cases(length, self.shared["toy"]):
                key = {"length": length, "label": label}
                if label in self.labels and not self.has("decode", key):
                    self.result["decode"].append({**key, **self.run(kind="decode", **key)})
                    self.save(f"decode n={length} {label}")

    def training(self, lengths: list[int]) -> None:
        from sa_hf.tools.bench.training import MODELS, contenders

        for length in lengths:
            for model in MODELS:
                labels = contenders(model, self.labels)
                key = {"length": length, "model": model}
                if self.has("training", key):
                    continue
                found = self.run(kind="step_times", labels=labels, **key)
                each = {label: self.run(kind="step_memory", label=label, **key) for label in found["seconds"]}
                memory = {label: one["mb"] for label, one in each.items()}
                self.result["training"].append({**key, **found, "memory": memory})
                self.save(f"training n={length} {model}")

    def has(self, section: str, key: dict[str, Any]) -> bool:
        return any(all(row[k] == value for k, value in key.items()) for row in self.result[section])

    def save(self, what: str) -> None:
        from sa_hf.tools.bench.cpu_report import markdown

        self.result["speed"].sort(key=lambda row: (row["dropout"], row["length"], not row["causal"], row["backward"]))
        self.result["memory"].sort(key=lambda row: (row["length"], not row["causal"]))
        self.path("json").write_text(json.dumps(self.result, indent=1) + "\n")
        self.path("md").write_text(markdown(self.result))
        print(f"  {what}", file=sys.stderr, flush=True)

    def draw(self) -> None:
        from sa_hf.tools.bench.cpu_report import plot

        plot(self.result, self.path("png"))


def without_kernels() -> dict[str, str]:
    """The switch that leaves the CPU's compiled kernels out, where it is set: into a result file of its own."""
    from sa_hf.ops.cpp.kernels import SWITCH

    return {SWITCH: "0"} if os.environ.get(SWITCH) == "0" else {}


def median_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One table row of several processes: the median of their times by contender. What a process measures moves as a
    whole from one to the next, which more rounds in one do not show."""
    rows: dict[str, dict[str, float]] = {}
    for label in found[0]["rows"]:
        each = [one["rows"][label] for one in found if label in one["rows"]]
        times = {key: statistics.median(row[key] for row in each) for key in each[0] if key.endswith("_s")}
        rows[label] = {**each[0], **times}
    return {**found[0], "rows": rows, "processes": len(found), "rounds": sum(one["rounds"] for one in found)}


def exponent(points: list[dict[str, float]], key: str) -> float:
    """Slope of the least-squares line through (log length, log value)."""
    x = [math.log(p["length"]) for p in points]
    y = [math.log(max(p[key], 1e-9)) for p in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else math.nan


if __name__ == "__main__":
    app()
