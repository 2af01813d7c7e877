"""The house stays one that a newcomer finds their way in: every room is on the map, and no file or function is long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sa_hf"
MOST_LINES = 400
# Of a function, its docstring not counted, nor a kernel's signature, which is up to 16 lines.
MOST_OF_A_FUNCTION = 60


def rooms(folder: Path) -> Iterator[str]:
    """The modules and packages of a folder."""
    for path in sorted(folder.iterdir()):
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists():
            yield path.stem


@pytest.mark.parametrize("folder", ["ops", "hf"])
def test_every_room_is_on_the_map(folder: str) -> None:
    """A module that the docstring of its package does not name is one that nobody finds."""
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    named = set(re.findall(r"``(\w+)(?:[./]\w+)*``", text))
    assert len(list(rooms(PACKAGE / folder))) > 5
    assert [room for room in rooms(PACKAGE / folder) if room not in named] == []


def test_every_folder_is_in_the_table_of_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    missing = [room for room in rooms(PACKAGE) if not re.search(rf"\b{room}\b", table)]
    assert missing == []


def test_files_and_functions_are_short() -> None:
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if len(text.splitlines()) > MOST_LINES:
            long.append(f"{path}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = node.body[0] if ast.get_docstring(node) is not None else None
                lines = (node.end_lineno or 0) - node.lineno + 1
                lines -= (doc.end_lineno or 0) - doc.lineno + 1 if doc is not None else 0
                lines -= node.body[0].lineno - node.lineno if node.name.endswith("_kernel") else 0
                if lines > MOST_OF_A_FUNCTION:
                    long.append(f"{path}: {node.name} has {lines} lines")
    for path in (PACKAGE / "ops" / "cpp").glob("*.[hc]*"):
        if len(path.read_text().splitlines()) > MOST_LINES:
            long.append(f"{path}: {len(path.read_text().splitlines())} lines")
    assert long == []
