"""The text of the kernels' C++ files, which are no Python modules.

A checkpoint that carries this package's code as flat Python files carries :func:`embedded` in place of this module.
"""

from __future__ import annotations

from importlib.resources import files

FILES = {x.name: x.read_text(encoding="utf-8") for x in files(__package__).iterdir() if x.name.endswith((".h", ".cpp"))}


def embedded() -> str:
    """This module with the texts in it, as Python source."""
    texts = "".join(f'    "{name}": r"""{text}""",\n' for name, text in sorted(FILES.items()))
    return f'"""The text of the CPU kernels\' C++ files."""\n\nFILES = {{\n{texts}}}\n'
