"""Results as they come: one JSON file that a second run resumes, and the Markdown table drawn from it."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
# Rows are kept where these fields of the header are equal. The commit is not among them: a checkout without .git has
# none, and one with changes has that of no code in particular.
SAME = ("device", "torch", "triton", "code", "launches")
STARTED = "started, never ended"  # the error of a row while it is measured
# The GPU suite's figures: a section that a run did not reach says so.
FIGURES = ("dense", "ours", "kernels", "options", "decode", "flex", "training", "hf-bigbird")


def code_digest(root: Path = ROOT) -> str:
    """Of the Python files that a row of the GPU suite depends on, by name and content."""
    return digest([*root.glob("sa_hf/**/*.py"), root / "scripts" / "gpu_suite.py"], root)


def digest(files: Iterable[Path], root: Path = ROOT) -> str:
    """Twelve hexadecimal digits of the files' names below ``root`` and their content; absent files count as empty."""
    total = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes() if path.exists() else b""
        total.update(f"{os.path.relpath(path, root)}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:12]


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on: device, versions, commit, date."""
    import transformers

    described = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }
    try:
        import triton

        described["triton"] = triton.__version__
    except ImportError:
        described["triton"] = "absent"
    return described


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Result files themselves are written next to the code: they do not make it another version.
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "sa_hf", "scripts")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Report:
    """Rows by section and key, saved after each one; what is there already is not measured again.

    Args:
        path: the JSON file; what it has already is gone on with, unless ``fresh`` or another header's (``SAME``).
        resume: the file to go on with where there is none at ``path``.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, fresh: bool = False, resume: Path | None = None) -> None:
        self.path = path
        known = path if path.exists() or resume is None else resume
        self._earlier: dict[str, Any] = json.loads(known.read_text()) if known.exists() and not fresh else {}
        self.data: dict[str, Any] = {"sections": {}}
        self.head(header)

    def head(self, header: dict[str, Any], keep: Iterable[str] = ()) -> None:
        """Set the header, and begin with the earlier run's rows where they are of the same; the sections to ``keep``
        stay as they are."""
        kept = {k: v for k, v in self.data["sections"].items() if k in keep}
        same = self._earlier and all(self._earlier.get("header", {}).get(k) == header.get(k) for k in SAME)
        self.data = {"header": header, "sections": {**(self._earlier["sections"] if same else {}), **kept}}

    def rows(self, section: str) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = self.data["sections"].setdefault(section, {})
        return rows

    def done(self, section: str, key: str) -> bool:
        """Whether a row is there; one that ended in an error or did not pass is tried again by the next run, unless it
        ended that run."""
        row = self.rows(section).get(key, {"error": "missing"})
        return _gave_up(row) or ("error" not in row and row.get("pass", True) is True)

    def given_up(self) -> list[str]:
        """Rows that are not tried again: the device failed in them, or they never ended."""
        return [f"{s}/{k}" for s, rows in self.data["sections"].items() for k, row in rows.items() if _gave_up(row)]

    def add(self, section: str, key: str, row: dict[str, Any]) -> None:
        self.rows(section)[key] = row
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1))
        part.replace(self.path)
        self.path.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        header = self.data["header"]
        lines = [f"# {header.get('title', self.path.stem)}", ""]
        lines += [f"- {k}: {v}" for k, v in header.items() if k != "title"]
        if given_up := self.given_up():
            lines.append(
                f"- not tried again, since the device failed in them or they never ended: {', '.join(given_up)}"
            )
        for section, rows in self.data["sections"].items():
            if rows:
                lines += ["", f"## {section}", "", *_table(rows)]
        if "parity" in self.data["sections"]:
            for section in FIGURES:
                if not self.data["sections"].get(section):
                    lines += ["", f"## {section}", "", "not measured"]
        return "\n".join(lines) + "\n"


def _gave_up(row: dict[str, Any]) -> bool:
    return bool(row.get("fatal")) or row.get("error") == STARTED


def _table(rows: dict[str, dict[str, Any]]) -> list[str]:
    columns: list[str] = []
    for row in rows.values():
        columns += [c for c in row if c not in columns]
    lines = ["| case | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for key, row in rows.items():
        lines.append(f"| {key} | " + " | ".join(_cell(row.get(c)) for c in columns) + " |")
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")[:160]
