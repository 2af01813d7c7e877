"""The code that a checkpoint carries: this package's runtime in a few files beside the weights.

Transformers copies a checkpoint's code only along *flat* relative imports (``from .name import ...``). So the modules
that loading, running, training, saving and unpatching reach are written one after another, each after those that it
imports, into one file for each room of the package: ``sa_hf_<room>.py``. Only their imports change; comments and code
stay as they are, for whoever reads what they are asked to trust. In one file a name means one thing: modules of a room
that name two things alike are refused.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, lru_cache
from graphlib import CycleError, TopologicalSorter
from importlib.machinery import ModuleSpec, PathFinder
from typing import TypeGuard

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.files import HEADER, REMOTE_FILE
from sa_hf.ops.cpp import sources

PACKAGE = "sa_hf"
ROOT = "sa_hf.hf.patching.sparse_model"  # of patched models; a model of this package's own has its own module
# Where a checkpoint finds that module in the installed package: a path that stays, wherever the module goes.
FIXED = {ROOT: "sa_hf.hf.saving"}
# Tools that draw, measure or prepare: no loaded model needs them.
LEFT_OUT = ("sa_hf.tools", "sa_hf.tasks", "sa_hf.patterns.drawing", "sa_hf.hf.checkpoints.flatten")
# Whatever transformers itself requires; other packages must not become a condition of loading.
ALWAYS_THERE = {
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "packaging",
} | sys.stdlib_module_names

_REMOTE = '''\
"""Sparse attention for this checkpoint: the classes that "auto_map" in config.json names.

Written by sa_hf {version}. It runs on the installed sa_hf where the version is the same, and else on the copy of the
runtime that lies beside this file: sa_hf_*.py, the package's own modules, a file for each room of it.
"""

import sys

VERSION = "{version}"
# One copy in a process, however many checkpoints carry it: operators and attention functions register once.
_SHARED = "sa_hf_carried_{digest}"


def _runtime():
    try:
        import sa_hf

        if getattr(sa_hf, "__version__", None) == VERSION:
            from {package} import {module}

            return {module}
    except ImportError:
        pass
    if _SHARED not in sys.modules:
        from .{root} import __name__ as name

        sys.modules[_SHARED] = sys.modules[name]
    return sys.modules[_SHARED]


def __getattr__(name):
    """{offers}"""
    if name.startswith("_"):
        raise AttributeError(name)
    return {lookup}


def _files():
    """Never called: Transformers copies the files that it sees imported, the older ones only those of this file."""
{imports}
'''


_SPARSE_CLASS = "The sparse class of a Transformers class, by that class's name.", "_runtime().remote_attribute(name)"
_OWN_CLASS = "A class of the model, by its name.", "getattr(_runtime(), name)"


@lru_cache(maxsize=8)
def carried_files(root: str = ROOT) -> dict[str, str]:
    """The remote-code file and the files of the rooms: ``{file name: text}``, the same for every checkpoint of a root.

    Args: root: the module that the remote-code file hands out classes of.

    Raises:
        SparseAttentionError: a module imports in a way that cannot be carried, or two of a room name things alike.
    """
    from sa_hf import __version__

    modules = _reached(root)
    files = _placed(modules, root)
    _check_names(modules, files)
    texts: dict[str, str] = {}
    for name in modules:
        text = texts.setdefault(files[name], f"{HEADER}from __future__ import annotations\n")
        texts[files[name]] = f"{text}\n# {'-' * 10} {name} {'-' * (104 - len(name))}\n\n{_rewritten(name, files)}"
    for file, text in texts.items():
        _check_seen_alike(file, text)
    digest = hashlib.sha256("".join(f"{n}\n{texts[n]}" for n in sorted(texts)).encode()).hexdigest()[:12]
    carried = {f"{file}.py": _renamed(text, f"{PACKAGE}_{digest}") for file, text in sorted(texts.items())}
    imports = "\n".join(f"    from .{file} import __name__  # noqa: F401" for file in sorted(texts))
    offers, lookup = _SPARSE_CLASS if root == ROOT else _OWN_CLASS
    package, _, module = FIXED.get(root, root).rpartition(".")
    remote = _REMOTE.format(
        version=__version__, digest=digest, root=files[root], imports=imports, package=package, module=module,
        offers=offers, lookup=lookup,
    )  # fmt: skip
    return {REMOTE_FILE: HEADER + remote, **carried}


# -- which modules, and into which file --------------------------------------------------------------------------------


@dataclass(eq=False)
class _Module:
    """A module as it is carried: its source, and what it imports of the package; what it ``needs``, when it is itself
    imported."""

    source: str
    tree: ast.Module
    imports: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)


def _reached(root: str) -> dict[str, _Module]:
    """The modules that a root reaches, each after those that it needs."""
    found: dict[str, _Module] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _read(name)
            waiting += found[name].imports
    ordered: dict[str, _Module] = {}

    def visit(name: str) -> None:
        if name not in ordered:
            for other in sorted(found[name].needs):
                visit(other)
            ordered[name] = found[name]

    for name in sorted(found):
        visit(name)
    return ordered


def _read(name: str) -> _Module:
    spec = _find(name)
    if spec is None or not hasattr(spec.loader, "get_source"):
        raise SparseAttentionError(f"the source of {name!r} cannot be read, so a checkpoint cannot carry it")
    source: str = spec.loader.get_source(name)  # type: ignore[union-attr]  # checked above
    if name == sources.__name__:  # it reads files that are no modules
        source = sources.embedded()
    module = _Module(source, ast.parse(source))
    for node in _imports(module.tree):
        for imported in _modules_of(node, name):
            if imported.partition(".")[0] == PACKAGE:
                module.imports += [] if _left_out(imported) else [imported]
                module.needs += [imported] if node in module.tree.body and not _left_out(imported) else []
    return module


def _imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a module, but for those for types."""
    hidden = {inner for node in ast.walk(tree) if _for_types_only(node) for inner in ast.walk(node)}
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in hidden]


def _modules_of(node: ast.Import | ast.ImportFrom, name: str) -> list[str]:
    """What an import imports, by absolute names."""
    if isinstance(node, ast.ImportFrom):
        return [_source(node, name)]
    return [alias.name for alias in node.names]


def _source(node: ast.ImportFrom, name: str) -> str:
    if not node.level:
        return node.module or ""
    spec = _find(name)
    package = name if spec is not None and spec.submodule_search_locations is not None else name.rpartition(".")[0]
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _room(name: str) -> str:
    """The package that a module stands in, by its flat name; of one at the top, its own."""
    spec = _find(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    room = name if is_package or name.count(".") == 1 else name.rpartition(".")[0]
    return room.replace(".", "_")


def _placed(modules: dict[str, _Module], root: str) -> dict[str, str]:
    """``{module: file}``: a file for each room, and one for what it imports late (Triton's kernels, where Triton is).

    Of a room that other rooms stand in the midst of, what needs those goes into a file above them.

    Raises:
        SparseAttentionError: files would import each other.
    """
    at_once = _needed(modules, root)
    rooms = {name: _room(name) + ("" if name in at_once else "_late") for name in modules}
    levels: dict[str, dict[str, int]] = {}  # of each module: the rooms that it needs, and up to which of their files
    files: dict[str, str] = {}
    needed: dict[str, set[str]] = defaultdict(set)
    for name, module in modules.items():
        own, levels[name] = rooms[name], {}
        for other in module.needs:
            for room, level in levels[other].items():
                above = level + (room == own and rooms[other] != own)
                levels[name][room] = max(levels[name].get(room, 0), above)
        level = levels[name].setdefault(own, 0)
        files[name] = f"{own}_{level + 1}" if level else own
        needed[files[name]] |= {files[other] for other in module.needs} - {files[name]}
    try:
        TopologicalSorter(needed).prepare()
    except CycleError as error:
        raise SparseAttentionError(f"rooms of the package import each other: {error.args[1]}") from error
    return files


def _needed(modules: dict[str, _Module], root: str) -> set[str]:
    """What is imported as soon as the root is."""
    found: set[str] = set()
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += modules[name].needs
    return found


def _check_names(modules: dict[str, _Module], files: dict[str, str]) -> None:
    """That each name at the top of a file means one thing, and none that Python has itself.

    Raises:
        SparseAttentionError: it does not.
    """
    meaning: dict[str, dict[str, object]] = {}
    seen: dict[str, dict[str, tuple[object, str]]] = defaultdict(dict)
    for name, module in modules.items():
        meaning[name] = _bound(name, module, meaning)
        for bound, what in meaning[name].items():
            other = seen[files[name]].setdefault(bound, (what, name))
            if other[0] != what or hasattr(builtins, bound):
                with_whom = f"{other[1]} and {name}" if other[1] != name else f"Python and {name}"
                raise SparseAttentionError(
                    f"{bound!r} names two things, in {with_whom}, which a checkpoint carries in one file; rename one"
                )


def _bound(name: str, module: _Module, meaning: dict[str, dict[str, object]]) -> dict[str, object]:
    """What the names at the top of a module mean: where they come from, or the text of an assignment."""
    found: dict[str, object] = {}
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = name, node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            walked = [x for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]
            names = [x.id for x in walked if isinstance(x.ctx, ast.Store)]
            found.update(dict.fromkeys(names, ast.unparse(node)))
        elif isinstance(node, ast.ImportFrom):
            source = _source(node, name)
            known = meaning.get(source, {})
            found.update({a.asname or a.name: known.get(a.name, (source, a.name)) for a in node.names})
        elif isinstance(node, ast.Import):
            found.update({a.asname or a.name.partition(".")[0]: a.name if a.asname else None for a in node.names})
    # Never read again, or read by nobody here.
    return {key: what for key, what in found.items() if key not in ("_", "__all__", "annotations")}


@cache
def _find(name: str) -> ModuleSpec | None:
    """Where a module's source is, without importing anything; None where there is no such module."""
    parent = name.rpartition(".")[0]
    if not parent:
        return importlib.util.find_spec(name)
    above = _find(parent)
    if above is None or above.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, above.submodule_search_locations)


# -- a module's text -----------------------------------------------------------------------------------------------


def _rewritten(name: str, files: dict[str, str]) -> str:
    """One module's text for its place in a file, after the modules that it needs."""
    module = _read(name)
    lines = module.source.splitlines(keepends=True)
    nodes: list[ast.stmt] = [*_imports(module.tree), *(n for n in ast.walk(module.tree) if _for_types_only(n))]
    for node in sorted(nodes, key=lambda n: -n.lineno):
        if isinstance(node, ast.If):
            new = ["if TYPE_CHECKING:", "    pass"]
        elif isinstance(node, ast.Import):
            new = _plain_import(node, name, files)
        else:
            assert isinstance(node, ast.ImportFrom)
            new = _from_import(node, name, files)
        if not new and node not in module.tree.body:
            new = ["pass"]
        lines[node.lineno - 1 : node.end_lineno] = [f"{' ' * node.col_offset}{line}\n" for line in new]
    return "".join(lines)


def _for_types_only(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _plain_import(node: ast.Import, name: str, files: dict[str, str]) -> list[str]:
    lines = []
    for alias in node.names:
        top = alias.name.partition(".")[0]
        if top != PACKAGE:
            lines += _optional(top, ast.unparse(ast.Import([alias])))
        elif alias.asname is not None or alias.name == PACKAGE:
            raise _not_flat(name, node)
        elif _left_out(alias.name):
            lines.append(_refusal(alias.name))
        elif files[alias.name] != files[name]:  # for its effect alone: Transformers follows only "from .x import y"
            lines.append(f"from .{files[alias.name]} import __name__ as _{files[alias.name]}")
    return lines


def _from_import(node: ast.ImportFrom, name: str, files: dict[str, str]) -> list[str]:
    source = _source(node, name)
    if source == "__future__":  # stands at the head of the file
        return []
    if source.partition(".")[0] != PACKAGE:
        return _optional(source.partition(".")[0], ast.unparse(node))
    if _left_out(source):
        return [_refusal(source)]
    if source == PACKAGE or any(a.name == "*" or _find(f"{source}.{a.name}") is not None for a in node.names):
        raise _not_flat(name, node)
    if files[source] == files[name]:
        return [f"{a.asname} = {a.name}" for a in node.names if a.asname not in (None, a.name)]
    return [f"from .{files[source]} import {', '.join(ast.unparse(a) for a in node.names)}"]


def _optional(top: str, statement: str) -> list[str]:
    if top in ALWAYS_THERE:
        return [statement]
    # Transformers takes every import outside a "try" for a requirement of the checkpoint.
    return ["try:", f"    {statement}", "finally:", "    pass"]


def _left_out(module: str) -> bool:
    return any(module == left or module.startswith(f"{left}.") for left in LEFT_OUT)


def _refusal(module: str) -> str:
    return f'raise ImportError("a checkpoint does not carry {module}: install sa_hf")'


def _not_flat(name: str, node: ast.stmt) -> SparseAttentionError:
    return SparseAttentionError(
        f"{name}, line {node.lineno}: `{ast.unparse(node)}` cannot be carried by a checkpoint; "
        "import the names from the module that defines them"
    )


def _check_seen_alike(file: str, text: str) -> None:
    """Transformers finds imports by a regular expression over the text, docstrings included: it must see the same."""
    seen = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
    parsed = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level and n.module}
    if seen != parsed:
        raise SparseAttentionError(
            f"{file}: Transformers would copy {sorted(seen)}, but the modules import {sorted(map(str, parsed))}; "
            "reword the docstring line that begins like an import"
        )


def _renamed(text: str, namespace: str) -> str:
    """What registers by name in the process gets names of its own, so that a copy can live beside the package."""
    text = re.sub(rf"([\"']){PACKAGE}::", rf"\1{namespace}::", text)
    return text.replace(f"torch.ops.{PACKAGE}.", f"torch.ops.{namespace}.").replace(
        f'"sparse_{PACKAGE}"', f'"sparse_{namespace}"'
    )
