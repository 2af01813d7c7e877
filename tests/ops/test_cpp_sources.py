"""The C++ files: without a warning, laid out as Python thinks they are, and whole in what a checkpoint carries."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from sa_hf.ops.cpp import build, sources
from sa_hf.ops.cpp.call import Call

FOLDER = Path(sources.__file__).parent
STRICT = ("-Wall", "-Wextra", "-Werror")

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


def compiled(*words: str) -> str:
    """What g++ says of it, with every warning an error."""
    command = ["g++", *build.FLAGS, "-fopenmp", *STRICT, f"-I{FOLDER}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


@needs_gcc
@pytest.mark.parametrize("architecture", [*build.ARCHITECTURES[0], "-O2"])  # the machine's vectors, and the least
def test_the_kernels_compile_without_a_warning(architecture: str, tmp_path: Path) -> None:
    assert compiled(architecture, "-c", str(FOLDER / "kernels.cpp"), "-o", str(tmp_path / "kernels.o")) == ""


@needs_gcc
def test_a_warning_is_an_error_here(tmp_path: Path) -> None:
    code = tmp_path / "bad.cpp"
    code.write_text('#include "vectors.h"\nint f(int unused) { return 0; }\n')
    assert "unused" in compiled("-c", str(code), "-o", str(tmp_path / "bad.o"))


@needs_gcc
def test_each_field_of_a_call_lies_where_python_writes_it(tmp_path: Path) -> None:
    places = [f"static_assert(offsetof(Call, {name}) == {getattr(Call, name).offset});" for name, *_ in Call._fields_]
    size = f"static_assert(sizeof(Call) == {ctypes.sizeof(Call)});"
    code = tmp_path / "places.cpp"
    code.write_text("\n".join(["#include <cstddef>", '#include "call.h"', *places, size]))
    assert len(places) > 60
    assert compiled("-fsyntax-only", str(code)) == ""


def test_what_a_checkpoint_carries_holds_the_same_texts() -> None:
    found: dict[str, dict[str, str]] = {}
    exec(compile(sources.embedded(), "sources", "exec"), found)
    assert found["FILES"] == sources.FILES
    assert set(sources.FILES) == {path.name for path in FOLDER.iterdir() if path.suffix in (".h", ".cpp")}
