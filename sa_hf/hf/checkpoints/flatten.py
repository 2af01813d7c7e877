"""The code that a checkpoint carries: this package's runtime as flat files beside the weights.

Transformers copies a checkpoint's code only along *flat* relative imports (``from .name import ...``). So each
module that loading, running, training, saving and unpatching reach is written as ``sa_hf_<path>.py`` with its
imports made flat; comments and code stay as they are, for whoever reads what they are asked to trust.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from functools import cache, lru_cache
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
runtime that lies beside this file: sa_hf_*.py, the package's own modules with their imports made flat.
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
    """The remote-code file and the flat modules: ``{file name: text}``, the same for every checkpoint of a root.

    Args: root: the module that the remote-code file hands out classes of.

    Raises:
        SparseAttentionError: a module imports in a way that cannot be made flat.
    """
    from sa_hf import __version__

    modules: dict[str, str] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in modules:
            continue
        modules[name], imported = flatten_module(name)
        waiting += imported
    digest = hashlib.sha256("".join(f"{n}\n{modules[n]}" for n in sorted(modules)).encode()).hexdigest()[:12]
    files = {f"{flat(name)}.py": _renamed(text, f"{PACKAGE}_{digest}") for name, text in sorted(modules.items())}
    imports = "\n".join(f"    from .{flat(name)} import __name__  # noqa: F401" for name in sorted(modules))
    offers, lookup = _SPARSE_CLASS if root == ROOT else _OWN_CLASS
    package, _, module = FIXED.get(root, root).rpartition(".")
    remote = _REMOTE.format(
        version=__version__, digest=digest, root=flat(root), imports=imports, package=package, module=module,
        offers=offers, lookup=lookup,
    )  # fmt: skip
    return {REMOTE_FILE: HEADER + remote, **files}


def flat(module: str) -> str:
    """The flat name of a module: ``sa_hf.ops.parts`` is ``sa_hf_ops_parts``."""
    return module.replace(".", "_")


def flatten_module(name: str) -> tuple[str, list[str]]:
    """One module's text with flat imports, and the package's modules that it imports."""
    spec = _find(name)
    if spec is None or not hasattr(spec.loader, "get_source"):
        raise SparseAttentionError(f"the source of {name!r} cannot be read, so a checkpoint cannot carry it")
    source: str = spec.loader.get_source(name)  # type: ignore[union-attr]  # checked above
    if name == sources.__name__:  # it reads files that are no modules
        source = sources.embedded()
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    lines = source.splitlines(keepends=True)
    imported: list[str] = []
    found = [n for n in ast.walk(ast.parse(source)) if _is_import(n) or _for_types_only(n)]
    hidden = {inner for block in found if isinstance(block, ast.If) for inner in ast.walk(block) if inner is not block}
    for node in sorted((n for n in found if n not in hidden), key=lambda n: -n.lineno):
        if isinstance(node, ast.If):
            new = ["if TYPE_CHECKING:", "    pass"]
        elif isinstance(node, ast.Import):
            new = _plain_import(node, name, imported)
        else:
            new = _from_import(node, name, package, imported)
        lines[node.lineno - 1 : node.end_lineno] = [f"{' ' * node.col_offset}{line}\n" for line in new]
    text = HEADER + "".join(lines)
    _check_seen_alike(name, text)
    return text, imported


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


def _is_import(node: ast.AST) -> TypeGuard[ast.Import | ast.ImportFrom]:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _for_types_only(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _plain_import(node: ast.Import, name: str, imported: list[str]) -> list[str]:
    lines = []
    for alias in node.names:
        top = alias.name.partition(".")[0]
        if top != PACKAGE:
            lines += _optional(top, ast.unparse(ast.Import([alias])))
        elif alias.asname is not None:
            lines += _submodule(alias.name, alias.asname, imported)
        elif alias.name == PACKAGE:
            raise _not_flat(name, node)
        elif _left_out(alias.name):
            lines.append(_refusal(alias.name))
        else:  # for its effect alone: Transformers follows only "from .x import y"
            imported.append(alias.name)
            lines.append(f"from .{flat(alias.name)} import __name__ as _{flat(alias.name)}")
    return lines


def _from_import(node: ast.ImportFrom, name: str, package: str, imported: list[str]) -> list[str]:
    source = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        source = ".".join([*above, source] if source else above)
    if source.partition(".")[0] != PACKAGE:
        return _optional(source.partition(".")[0], ast.unparse(node))
    if _left_out(source):
        return [_refusal(source)]
    submodules = [a for a in node.names if _find(f"{source}.{a.name}") is not None]
    lines = [line for a in submodules for line in _submodule(f"{source}.{a.name}", a.asname or a.name, imported)]
    names = [a for a in node.names if a not in submodules]
    if names:
        if source == PACKAGE or names[0].name == "*":
            raise _not_flat(name, node)
        imported.append(source)
        lines.append(f"from .{flat(source)} import {', '.join(ast.unparse(a) for a in names)}")
    return lines


def _submodule(module: str, bound: str, imported: list[str]) -> list[str]:
    if _left_out(module):
        return [_refusal(module)]
    imported.append(module)
    # The first line is the one that Transformers sees; the second binds the module.
    return [f"from .{flat(module)} import __name__ as _{flat(module)}", f"from . import {flat(module)} as {bound}"]


def _optional(top: str, statement: str) -> list[str]:
    if top in ALWAYS_THERE or top == "__future__":
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


def _check_seen_alike(name: str, text: str) -> None:
    """Transformers finds imports by a regular expression over the text, docstrings included: it must see the same."""
    seen = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
    parsed = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level and n.module}
    if seen != parsed:
        raise SparseAttentionError(
            f"{name}: Transformers would copy {sorted(seen)}, but the module imports {sorted(map(str, parsed))}; "
            "reword the docstring line that begins like an import"
        )


def _renamed(text: str, namespace: str) -> str:
    """What registers by name in the process gets names of its own, so that a copy can live beside the package."""
    text = re.sub(rf"([\"']){PACKAGE}::", rf"\1{namespace}::", text)
    return text.replace(f"torch.ops.{PACKAGE}.", f"torch.ops.{namespace}.").replace(
        f'"sparse_{PACKAGE}"', f'"sparse_{namespace}"'
    )
