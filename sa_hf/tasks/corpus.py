"""The embedded corpus: source and docstrings of the running Python's standard library. No network, no import of it."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sa_hf.errors import SparseAttentionError

# Tests and generated tables repeat themselves; turtledemo, idlelib and tkinter are missing from some distributions.
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings", "pydoc_data", "lib2to3"}
    | {"distutils", "ensurepip", "idlelib", "tkinter", "turtledemo", "lib-dynload"}
)


@dataclass(frozen=True)
class Source:
    """One file of the standard library: its path below the library's root with ``/``, and its text."""

    path: str
    text: str


@lru_cache(maxsize=1)
def stdlib_sources() -> tuple[Source, ...]:
    """The pure Python modules of the standard library, sorted by path (about 10 MB of text).

    Raises:
        SparseAttentionError: this Python has no standard library in plain files (a zipped or frozen build).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [Source(path.relative_to(root).as_posix(), _read(path)) for path in _modules(root)]
    if not sources:
        raise SparseAttentionError(
            f"the standard library at {root} has no .py files: the embedded corpus needs an ordinary Python; "
            "pass a data set of your own instead"
        )
    return tuple(sources)


def package_sources(packages: Sequence[str]) -> dict[str, list[Source]]:
    """The sources of top-level packages: ``{package: sources}``; raises ``SparseAttentionError`` where one has none."""
    found: dict[str, list[Source]] = {name: [] for name in packages}
    for source in stdlib_sources():
        top = source.path.split("/")[0].removesuffix(".py")
        if top in found:
            found[top].append(source)
    for name, sources in found.items():
        if not sources:
            raise SparseAttentionError(f"the standard library of this Python has no package {name!r} in plain files")
    return found


def docstrings(sources: Iterable[Source], minimum: int = 80) -> list[Source]:
    """Docstrings of modules, classes and functions with at least ``minimum`` characters; ``path`` is ``file:line``."""
    found = []
    for source in sources:
        for line, text in _docstrings(source.text):
            if len(text) >= minimum:
                found.append(Source(f"{source.path}:{line}", text))
    return found


def sections(text: str, size: int) -> list[str]:
    """Cut a text at line ends into pieces of at least ``size`` characters; a shorter rest is left out."""
    pieces: list[str] = []
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            pieces.append("".join(lines))
            lines, length = [], 0
    return pieces


def _modules(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts[:-1]):
            yield path


def _read(path: Path) -> str:
    # A few files are declared in another encoding; their odd letters do not matter here.
    return path.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Documented:
    """A function or class of the standard library: its dotted name, its docstring, and the docstring's first line."""

    name: str
    text: str
    summary: str


@lru_cache(maxsize=2)
def documented(held_out: bool) -> tuple[Documented, ...]:
    """What the standard library documents with a whole sentence in its first line and at least a paragraph below.

    Args:
        held_out: of every tenth file, else of the others.
    """
    found: dict[str, Documented] = {}
    for source in (s for i, s in enumerate(stdlib_sources()) if (i % 10 == 9) == held_out):
        module = source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, text in _named_docstrings(source.text):
            summary, _, rest = text.partition("\n")
            if summary.endswith(".") and 20 <= len(summary) <= 160 and len(rest.strip()) >= 80:
                found.setdefault(f"{module}.{name}", Documented(f"{module}.{name}", text, summary))
    return tuple(found.values())


def _docstrings(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "lineno", 1), docstring


def _named_docstrings(text: str) -> Iterator[tuple[str, str]]:
    """Docstrings of public functions, classes and their methods, with their names in the module."""
    for node in _parsed(text).body:
        for owner, prefix in ((node, ""), *((inner, f"{getattr(node, 'name', '')}.") for inner in _body(node))):
            if isinstance(owner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(owner)
                if docstring and not owner.name.startswith("_"):
                    yield prefix + owner.name, docstring


def _body(node: ast.stmt) -> list[ast.stmt]:
    return node.body if isinstance(node, ast.ClassDef) else []


def _parsed(text: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(text)
    except SyntaxError:
        return ast.Module([], [])
