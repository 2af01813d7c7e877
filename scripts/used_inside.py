"""Run the tests inside other libraries and write what they found: the table "used inside".

    python scripts/used_inside.py            # tests/stacks; model_cards/results/used_inside.md and README's block

A row is a library, what was checked, and how its tests ended: each comes from the mark of the tests that ran
(``tests/stacks/used_inside.py``), so the table says nothing that no test has checked.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "model_cards" / "results" / "used_inside.md"
BEGIN, END = "<!-- begin: used-inside -->", "<!-- end: used-inside -->"


def run_tests(extra: list[str]) -> list[dict[str, str]]:
    """What the marked tests found: library, what was checked, the test, its result."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        environment = {**os.environ, "SA_HF_USED_INSIDE": str(target), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/stacks", *extra]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        found: list[dict[str, str]] = json.loads(target.read_text("utf-8"))
    return found


def table(found: list[dict[str, str]], date: str) -> str:
    """The rows, one for each library and check, as Markdown."""
    results: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in found:
        if one["result"] != "skipped":
            results[one["library"], one["what"]].append(one["result"])
    lines = ["| library | version | what was checked | result | date |", "| --- | --- | --- | --- | --- |"]
    for (library, what), ended in results.items():
        passed = ended.count("passed")
        result = f"{passed} of {len(ended)} tests passed"
        lines.append(f"| {library} | {version(library)} | {what} | {result} | {date} |")
    lines += ["", f"transformers {version('transformers')}, torch {version('torch')}; `python scripts/used_inside.py`."]
    return "\n".join(lines)


def fill(path: Path, text: str) -> None:
    """Put a text between README's marks."""
    whole = path.read_text("utf-8")
    before, _, rest = whole.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path} has no {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    found = run_tests(parser.parse_args().pytest)
    text = table(found, datetime.date.today().isoformat())
    TABLE.write_text(f"# Used inside other libraries\n\n{text}\n", "utf-8")
    fill(ROOT / "README.md", text)
    if any(one["result"] == "failed" for one in found):
        raise SystemExit("some checks failed; the table says which")


if __name__ == "__main__":
    main()
