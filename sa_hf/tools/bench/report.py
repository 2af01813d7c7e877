"""Results as they come: one JSON file that a second run resumes, and the Markdown table drawn from it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


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
    """Rows by section and key, saved after each one; what is there already is not measured again."""

    def __init__(self, path: Path, header: dict[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {"header": header, "sections": {}}
        if path.exists() and not fresh:
            earlier = json.loads(path.read_text())
            same = all(
                earlier.get("header", {}).get(k) == header.get(k) for k in ("device", "commit", "torch", "triton")
            )
            if same:
                self.data = earlier

    def rows(self, section: str) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = self.data["sections"].setdefault(section, {})
        return rows

    def done(self, section: str, key: str) -> bool:
        """Whether a row is there; one that ended in an error is tried again by the next run."""
        return "error" not in self.rows(section).get(key, {"error": "missing"})

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
        for section, rows in self.data["sections"].items():
            if rows:
                lines += ["", f"## {section}", "", *_table(rows)]
        return "\n".join(lines) + "\n"


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
