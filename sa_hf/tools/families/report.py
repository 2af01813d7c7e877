"""What was found, as JSON that a second run goes on with, and as the table in ``model_cards/families.md``."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import transformers

from sa_hf.tools.bench.report import ROOT, digest, machine
from sa_hf.tools.families.compare import ERROR, NOT_BUILT, REFUSED, RIGHT, WRONG
from sa_hf.tools.families.registry import Entry, entries

STATUSES = (RIGHT, REFUSED, NOT_BUILT, WRONG, ERROR)
COMMAND = "python scripts/families.py"


def code_digest() -> str:
    """Of the code that decides what is found: the package but the command line and its other tools."""
    files = [path for path in ROOT.glob("sa_hf/**/*.py") if "tools" not in path.parts or "families" in path.parts]
    return digest(files)


class Table:
    """Results by class name, each with the code that it was found with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, dict[str, Any]] = {}
        self.code = code_digest()
        if path.exists():
            kept = json.loads(path.read_text("utf-8"))
            if kept["transformers"] == transformers.__version__:
                self.results = kept["entries"]

    def is_current(self, entry: Entry) -> bool:
        return self.results.get(entry.name, {}).get("code") == self.code

    def status(self, entry: Entry) -> str | None:
        return self.results.get(entry.name, {}).get("status")

    def add(self, entry: Entry, found: dict[str, Any]) -> None:
        found = {**found, "code": self.code}
        if "figures" in found:
            found["figures"] = {name: float(f"{x:.1e}") for name, x in found["figures"].items()}
        self.results[entry.name] = found

    def counts(self) -> Counter[str]:
        return Counter(found["status"] for found in self.results.values())

    def save(self) -> None:
        lines = [f"  {json.dumps(name)}: {json.dumps(self.results[name])}" for name in sorted(self.results)]
        head = json.dumps({"transformers": transformers.__version__})[1:-1]
        self.path.write_text(f'{{{head}, "entries": {{\n' + ",\n".join(lines) + "\n}}\n", "utf-8")


def markdown(table: Table) -> str:
    """The table of the model card: counts, what is right by architecture, and every reason with whom it holds for."""
    import torch

    known = [entry for entry in entries() if entry.name in table.results]
    counts = table.counts()
    shown = machine(torch.device("cpu"))
    lines = [
        "# Every architecture of Transformers",
        "",
        f"The model classes that the auto classes of transformers {transformers.__version__} name, each built tiny "
        "with random weights, patched, and compared with its own eager attention under the pattern's pairs as a 4-D "
        "mask: outputs on real tokens and the gradient of every parameter (three static patterns; rows padded on the "
        "right and on the left), greedy generation with a dynamic, a static and a sparse cache against none, and a "
        "reload through `save_pretrained` and the auto class with `trust_remote_code=True`.",
        "",
        f"**{counts[RIGHT]} right, {counts[REFUSED]} refused with the reason, {counts[NOT_BUILT]} not built, "
        f"{counts[WRONG]} wrong, {counts[ERROR]} errors without a reason**, of {len(known)} "
        f"(`{COMMAND}`, torch {shown['torch']}, {shown['date']}).",
        "",
        "One difference is by design: a row of padding is 0 here, so a head that pools the first position of a row "
        "padded on the left reads 0. Such heads are compared with rows of padding set to 0; their notes say so.",
        "",
        "## Right",
        "",
        "| architecture | patched | classes |",
        "| --- | --- | --- |",
    ]
    by_type: dict[str, list[Entry]] = defaultdict(list)
    for entry in known:
        if table.status(entry) == RIGHT:
            by_type[entry.model_type].append(entry)
    for model_type, found in sorted(by_type.items()):
        patched = ", ".join(dict.fromkeys(table.results[entry.name].get("patched", "") for entry in found))
        lines.append(f"| {model_type} | {patched} | {', '.join(entry.name for entry in found)} |")
    for status in (WRONG, ERROR, REFUSED, NOT_BUILT):
        lines += ["", f"## {status.capitalize()}", "", "| reason | classes |", "| --- | --- |"]
        reasons: dict[str, list[str]] = defaultdict(list)
        for entry in known:
            if table.status(entry) == status:
                reasons[reason_of(entry, table.results[entry.name])].append(entry.name)
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            lines.append(f"| {reason.replace('|', '/')} | {len(names)}: {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def reason_of(entry: Entry, found: dict[str, Any]) -> str:
    """A reason without the names in it, so that classes refused for the same are one row."""
    reason = found.get("reason", "").replace(entry.name, "the model")
    reason = re.sub(r"\(model_type '[^']*'\)|\([\w.]+\.[\w.]+\)|; models that ask: .*", "", reason)
    return re.sub(r"layer \d+", "a layer", re.sub(r"\s+", " ", reason)).strip()
