"""The builder of C++ kernels: what it compiles, what it keeps, and what it says where it cannot."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sa_hf.ops.cpp import CppEngine, build
from sa_hf.ops.cpp.build import BuildError, load
from sa_hf.tools import doctor
from sa_hf.tools.doctor import _cpu_kernels

SOURCE = """
extern "C" int is_nan(float x) { return x != x; }
extern "C" int threads_of_loop(int wanted, int n, float* x) {
  int threads = 0;
  #pragma omp parallel num_threads(wanted)
  {
    #pragma omp atomic
    threads++;
    #pragma omp for
    for (int i = 0; i < n; i++) x[i] += i;
  }
  return threads;
}
"""
IN_A_FRESH_PROCESS = """
import ctypes, sys, threading, torch
from sa_hf.ops.cpp.build import load
library = load(sys.stdin.read(), "trial")
torch.set_num_threads(2)
x = torch.zeros(100)
counts = []
def run():
    counts.append(library.threads_of_loop(torch.get_num_threads(), 100, ctypes.c_void_p(x.data_ptr())))
run()
other = threading.Thread(target=run)
other.start()
other.join()
assert x.tolist() == [2.0 * i for i in range(100)], x
print(*counts)
if sys.platform == "linux":
    lines = [line.split() for line in open("/proc/self/maps")]
    files = {words[5] for words in lines if len(words) > 5}
    print(*sorted(f for f in files if f.rsplit("/", 1)[-1].startswith(("libgomp", "libiomp", "libomp"))))
"""

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or any(map(shutil.which, build.COMPILERS))) or sys.platform == "win32",
    reason="no C++ compiler on this machine",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SA_HF_CACHE_DIR", str(folder))
    forget(monkeypatch)
    return folder


@pytest.fixture
def compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line for each run of the compiler: ``CXX`` is a script that writes it and calls the real one."""
    log, script = tmp_path / "compiles", tmp_path / "counting compiler"
    log.touch()
    real = build.shlex.join(build.compiler())
    script.write_text(f'#!/bin/sh\ncase "$*" in *kernels.cpp*) echo "$@" >> "{log}";; esac\nexec {real} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", build.shlex.quote(str(script)))
    return log


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fresh process knows: nothing."""
    monkeypatch.setattr(build, "_outcomes", {})


def count(log: Path) -> int:
    return len(log.read_text().splitlines())


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def start() -> subprocess.Popen[str]:
    root = Path(build.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.splitlines()


def works(library: ctypes.CDLL) -> bool:
    library.is_nan.argtypes = [ctypes.c_float]
    return bool(library.is_nan(float("nan")) == 1 and library.is_nan(float("inf")) == 0)


@needs_compiler
def test_a_source_is_compiled_once_and_kept(cache: Path, compiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = load(SOURCE, "trial")
    assert works(library)
    assert load(SOURCE, "trial") is library
    (kept,) = cache.iterdir()  # nothing of the build is left beside it
    assert kept.name.startswith("trial-")
    if os.name == "posix":
        assert cache.stat().st_mode & 0o777 == 0o700
        assert kept.stat().st_mode & 0o777 == 0o700
    assert b"libgomp" not in kept.read_bytes()
    forget(monkeypatch)
    assert works(load(SOURCE, "trial"))
    assert count(compiles) == 1
    load(SOURCE + "\n", "trial")
    assert count(compiles) == 2


@needs_compiler
def test_processes_share_the_file_and_torchs_threads(cache: Path, compiles: Path) -> None:
    both = [start(), start()]
    for process in both:
        assert process.stdin is not None
        process.stdin.write(SOURCE)
        process.stdin.close()
        process.stdin = None
    outputs = [finish(process) for process in both]
    assert [path.suffix for path in cache.iterdir()] == [".so"] * len(libraries(cache))
    before = count(compiles)
    third = start()
    out, err = third.communicate(SOURCE, timeout=240)
    assert third.returncode == 0, err
    assert 1 <= before <= 2
    assert count(compiles) == before
    for lines in [*outputs, out.splitlines()]:
        assert lines[0] == "2 2"
        if sys.platform == "linux":
            assert len(lines[1].split()) == 1, lines


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        ("_processor", lambda: "another processor"),
        ("FLAGS", ("-O1", "-std=c++17", "-fPIC")),
    ],
)
def test_another_machine_compiles_its_own(
    change: tuple[str, object], cache: Path, compiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(SOURCE, "trial")
    forget(monkeypatch)
    monkeypatch.setattr(build, *change)
    load(SOURCE, "trial")
    assert count(compiles) == 2
    assert len(libraries(cache)) == 2


@needs_compiler
def test_another_torch_compiles_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build._fingerprint(SOURCE, build.compiler())
    assert build._fingerprint(SOURCE, build.compiler()) == before
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert build._fingerprint(SOURCE, build.compiler()) != before


@needs_compiler
@pytest.mark.parametrize("keep", [0.0, 0.5], ids=["empty", "half"])
def test_a_truncated_library_is_built_again(
    keep: float, cache: Path, compiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(mode=0o700)
    # The file of a source that this process has not loaded: a truncated one would be that process's own mapping.
    stem = f"trial-{build._fingerprint(SOURCE, build.compiler())}"
    work = cache.parent / "work"
    work.mkdir()
    whole = build._compile(SOURCE, build.compiler(), work)
    kept = cache / f"{stem}-{build._content_hash(whole)}.so"
    content = whole.read_bytes()
    kept.write_bytes(content[: int(len(content) * keep)])
    assert works(load(SOURCE, "trial"))
    assert count(compiles) == 2
    (again,) = libraries(cache)
    assert again.name == f"{stem}-{build._content_hash(again)}.so"
    forget(monkeypatch)
    assert works(load(SOURCE, "trial"))
    assert count(compiles) == 2


@needs_compiler
def test_a_whole_file_that_is_no_library_is_built_again(cache: Path, compiles: Path) -> None:
    cache.mkdir(mode=0o700)
    text = cache / "text"
    text.write_text("no library")
    text.rename(cache / f"trial-{build._fingerprint(SOURCE, build.compiler())}-{build._content_hash(text)}.so")
    assert works(load(SOURCE, "trial"))
    assert count(compiles) == 1


@needs_compiler
def test_a_source_that_fails_says_why_and_is_not_tried_again(cache: Path, compiles: Path) -> None:
    for _ in range(2):
        with pytest.raises(BuildError, match=r"exit status 1.*\n(.*\n)*.*no_such_thing"):
            load("int f() { return no_such_thing; }", "trial")
    assert count(compiles) == 1
    assert not list(cache.iterdir())


@needs_compiler
def test_an_undefined_function_is_an_error_of_load(cache: Path) -> None:
    source = 'extern "C" void __kmpc_fork_call(); extern "C" void f() { __kmpc_fork_call(); }'
    with pytest.raises(BuildError, match=r"(?s)cannot be loaded.*__kmpc_fork_call.*install g\+\+"):
        load(source, "trial")
    assert not list(cache.iterdir())


@needs_compiler
@pytest.mark.parametrize(("refused", "runs"), [("march", 2), ("march mcpu", 3)])
def test_a_compiler_without_native_flags_serves(
    refused: str, runs: int, tmp_path: Path, compiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "old"
    tests = "\n".join(
        f'case "$*" in *{flag}*kernels.cpp*) echo "$@" >> "{compiles}"; echo "unknown: -{flag}" >&2; exit 1;; esac'
        for flag in refused.split()
    )
    # -mcpu=native is deprecated or unknown on x86: the script takes it away before the real compiler sees it.
    rest = 'for word; do shift; [ "$word" = -mcpu=native ] || set -- "$@" "$word"; done'
    script.write_text(f'#!/bin/sh\n{tests}\n{rest}\nexec {os.environ["CXX"]} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    assert works(load(SOURCE, "trial"))
    assert count(compiles) == runs


def test_no_compiler_names_gcc_and_cxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler.*install g\+\+.*CXX"):
        load(SOURCE, "trial")


@pytest.mark.parametrize(
    ("value", "message"), [("no-such-compiler -O2", "'no-such-compiler' is not a program"), ("g++ '", "not a command")]
)
def test_a_wrong_cxx_is_named(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(BuildError, match=f"CXX=.*{message}.*install g"):
        load(SOURCE, "trial")


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "win32")
    with pytest.raises(BuildError, match="not supported on Windows"):
        load(SOURCE, "trial")


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")
@pytest.mark.parametrize("how", ["not a folder", "written by others", "of another user", "no home"])
def test_a_folder_that_cannot_be_trusted_is_not_used(
    how: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "not a folder":
        cache.write_text("")
    else:
        cache.mkdir(mode=0o700)
    if how == "written by others":
        cache.chmod(0o770)
    if how == "of another user":
        monkeypatch.setattr(build.os, "geteuid", lambda: os.getuid() + 1)
    if how == "no home":
        for variable in ("SA_HF_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(build.Path, "home", no_home)
    temporary = cache.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    with caplog.at_level(logging.WARNING):
        library = load(SOURCE, "trial")
    assert works(library)
    assert library._name.startswith(str(temporary))
    assert not list(temporary.iterdir())
    assert cache.is_file() or not list(cache.iterdir())
    assert "SA_HF_CACHE_DIR" in caplog.text


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SA_HF_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/sa_hf"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/sa_hf"),
        ({"HOME": "/h"}, "/h/.cache/sa_hf"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="paths of POSIX")
def test_the_cache_folder_is_chosen_by_the_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SA_HF_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert build._chosen_folder() == Path(expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_forked_during_a_build_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError):
        load(SOURCE, "first")
    with build._lock:  # as another thread's build would hold it
        child = os.fork()
        if child == 0:
            os._exit(0 if build._lock.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_compiler
def test_doctor_names_compiler_folder_and_units(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "units", lambda: "avx512_bf16")
    finding = _cpu_kernels()
    assert finding.ok is True
    assert "AVX512-BF16" in finding.found
    assert str(cache) in finding.found
    assert build.compiler()[0] in finding.found


def test_doctor_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CppEngine, "unsupported", lambda *_: "switched off by SA_HF_CPU_KERNELS=0")
    finding = _cpu_kernels()
    assert finding.ok is None
    assert "SA_HF_CPU_KERNELS=0" in finding.found
    assert "torch's own operators serve instead" in finding.advice
