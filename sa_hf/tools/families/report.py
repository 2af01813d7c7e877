"""What was found, as JSON that a second run goes on with, and as the table in ``model_cards/families.md``."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from sa_hf.tools.bench.report import ROOT, digest, machine
from sa_hf.tools.families.compare import ERROR, NOT_BUILT, REFUSED, RIGHT, WRONG
from sa_hf.tools.families.most_used import MOST_USED
from sa_hf.tools.families.registry import Entry, entries

STATUSES = (RIGHT, REFUSED, NOT_BUILT, WRONG, ERROR)
COMMAND = "python scripts/families.py"
HEAD = """# Every architecture of Transformers

An entry is one model class that an auto class of Transformers names: the body of an architecture (what `AutoModel`
loads), or one of its heads (for a causal or masked language model, sequence or token classification, questions, ...).
Each is counted once, under the first auto class that names it. Heads stand on a body that is an entry, too, so the
count of bodies is the count of architectures, and a head shows that outputs, gradients, generation and a reload hold
through it.

Each is built tiny with random weights, patched, and compared with its own eager attention under the pattern's pairs as
a 4-D mask: outputs on real tokens and the gradient of every parameter (a sliding window with sinks; bodies under two
more static patterns; rows padded on the right and on the left), greedy generation with a dynamic, a static and a sparse
cache against none, and a reload through `save_pretrained` and the auto class with `trust_remote_code=True`. The root
mean square of an error is at most 1e-3 of the output's (5e-3 of a gradient's). What could not be compared stands in the
notes of the [JSON](results/families.json): a dense model that does not generate, or whose own cache changes its logits.

Right: all that was compared agrees. Refused: `patch_model`, or the call that would need it, raises and says why.
Not built: the dense model does not run in tiny form with inputs that are known here; nothing is said of it. Wrong: it
ran and differs. Error: something else was raised.

One difference is by design: a row of padding is 0 here, so a head that pools the first position of a row padded on the
left reads 0. Such heads are compared with rows of padding set to 0; their notes say so.
"""


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
        found = {**found, "type": entry.model_type, "body": entry.is_base, "code": self.code}
        if "figures" in found:
            found["figures"] = {name: float(f"{x:.1e}") for name, x in found["figures"].items()}
        self.results[entry.name] = found

    def counts(self) -> Counter[str]:
        return Counter(found["status"] for found in self.results.values())

    def save(self) -> None:
        lines = [f"  {json.dumps(name)}: {json.dumps(self.results[name])}" for name in sorted(self.results)]
        shown = machine(torch.device("cpu"))
        head = json.dumps({name: shown[name] for name in ("transformers", "torch", "date")})[1:-1]
        total = f'"classes": {len(entries())}'
        self.path.write_text(f'{{{head}, {total}, "entries": {{\n' + ",\n".join(lines) + "\n}}\n", "utf-8")


Results = dict[str, dict[str, Any]]


def sentence(path: Path) -> str:
    """The counts of a results file, for the README."""
    if not path.exists():
        return "Not run yet."
    kept = json.loads(path.read_text("utf-8"))
    found: Results = kept["entries"]
    counts, bodies, used = _counts(found.values()), _counts(_bodies(found)), most_used(found)
    left = kept["classes"] - len(found)
    tried = f" ({left} more were not tried)" if left else ""
    missing = [name for name, one in used.items() if one["status"] != RIGHT]
    return (
        f"Of the {len(found)} model classes that the auto classes of transformers {kept['transformers']} name{tried}, "
        f"tiny and with random weights: **{counts[RIGHT]} right, {counts[WRONG]} wrong, {counts[ERROR]} errors without "
        f"a reason**, {counts[REFUSED]} refused with the reason and {counts[NOT_BUILT]} not built. Of the "
        f"{sum(bodies.values())} bodies among them, which the other classes are heads of, {bodies[RIGHT]} are right. "
        f"Of the {len(MOST_USED)} [most used architectures](sa_hf/tools/families/most_used.py) the bodies of "
        f"{len(MOST_USED) - len(missing)} are right; not right: {', '.join(missing) or 'none'}. All, with reasons: "
        f"[families.md](model_cards/families.md) (`{COMMAND}`, torch {kept['torch']}, {kept['date']})."
    )


def markdown(path: Path) -> str:
    """The model card of a results file: what an entry is, the counts, what is right by architecture, and every reason
    with whom it holds for."""
    found: Results = json.loads(path.read_text("utf-8"))["entries"]
    lines = [HEAD, sentence(path).replace("(model_cards/", "(").replace("(sa_hf/", "(../sa_hf/"), ""]
    lines += ["| | right | refused | not built | wrong | error |", "| --- | " + "--- | " * 5]
    for title, some in (("bodies", _bodies(found)), ("heads", _heads(found)), ("all", list(found.values()))):
        counts = _counts(some)
        lines.append(f"| {title} | " + " | ".join(str(counts[status]) for status in STATUSES) + " |")
    lines += ["", "## The most used", "", "| architecture | its body | classes right |", "| --- | --- | --- |"]
    for model_type, body in most_used(found).items():
        of_it = [one for one in found.values() if one["type"] == model_type]
        shown = body["status"] if body["status"] == RIGHT else f"{body['status']}: {reason_of(body)}".replace("|", "/")
        lines.append(f"| {model_type} | {shown} | {_counts(of_it)[RIGHT]} of {len(of_it)} |")
    lines += ["", "## Right", "", "| architecture | patched | classes |", "| --- | --- | --- |"]
    by_type: dict[str, list[str]] = defaultdict(list)
    for name in _ordered(found):
        if found[name]["status"] == RIGHT:
            by_type[found[name]["type"]].append(name)
    for model_type, names in sorted(by_type.items()):
        patched = ", ".join(dict.fromkeys(found[name].get("patched", "") for name in names))
        lines.append(f"| {model_type} | {patched} | {', '.join(names)} |")
    for status in (WRONG, ERROR, REFUSED, NOT_BUILT):
        lines += ["", f"## {status.capitalize()}", "", "| reason | classes |", "| --- | --- |"]
        reasons: dict[str, list[str]] = defaultdict(list)
        for name in _ordered(found):
            if found[name]["status"] == status:
                reasons[reason_of({"name": name, **found[name]})].append(name)
        for reason, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
            lines.append(f"| {reason.replace('|', '/')} | {len(names)}: {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def most_used(found: Results) -> Results:
    """The body of each of the most used architectures, by its type; one that was not tried is not right."""
    untried = {"status": NOT_BUILT, "reason": "not tried"}
    bodies = {one["type"]: {"name": name, **one} for name, one in found.items() if one["body"]}
    return {model_type: bodies.get(model_type, untried) for model_type in MOST_USED}


def reason_of(found: dict[str, Any]) -> str:
    """A reason without the names in it, so that classes refused for the same are one row."""
    reason = found.get("reason", "").replace(found.get("name", "\0"), "the model")
    reason = re.sub(r"\(model_type '[^']*'\)|\([\w.]+\.[\w.]+\)|; models that ask: .*", "", reason)
    return re.sub(r"layer \d+", "a layer", re.sub(r"\s+", " ", reason)).strip()


def _counts(some: Iterable[dict[str, Any]]) -> Counter[str]:
    return Counter(one["status"] for one in some)


def _bodies(found: Results) -> list[dict[str, Any]]:
    return [one for one in found.values() if one["body"]]


def _heads(found: Results) -> list[dict[str, Any]]:
    return [one for one in found.values() if not one["body"]]


def _ordered(found: Results) -> list[str]:
    """Names by architecture, its body first."""
    return sorted(found, key=lambda name: (found[name]["type"], not found[name]["body"], name))
