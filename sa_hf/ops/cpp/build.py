"""Compiles C++ kernels with the machine's own compiler at first use, and keeps the shared library in a cache folder.

The library is linked against libtorch_cpu and not against an OpenMP runtime: its OpenMP calls then go to the runtime
that torch has loaded, under whatever name that build of torch gives it. A second runtime would bring a second pool of
threads, and each pool spins on the cores that the other needs.

A thread's OpenMP default is not torch's number of threads until that thread has made its first parallel torch call:
kernels should take ``torch.get_num_threads()`` as an argument, for a ``num_threads`` clause.

Environment: ``CXX`` is the compiler (it may hold flags); ``SA_HF_CACHE_DIR`` is the cache folder, by default
``$XDG_CACHE_HOME/sa_hf`` or ``~/.cache/sa_hf``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TypeAlias

import torch

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "c++", "clang++")
# No -ffast-math: masks are -inf, and a NaN must come out as one.
FLAGS = ("-O3", "-std=c++17", "-fPIC")
# Tried in this order, the next where the compiler or its assembler does not know the one before.
ARCHITECTURES: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
TIMEOUT = 300  # seconds for one run of the compiler
TAIL = 2000  # characters of the compiler's messages that an error shows

_UNKNOWN_ARCHITECTURE = re.compile(r"march|mcpu|no such instruction|unrecognized instruction", re.IGNORECASE)
_INSTALL = "install g++, or name a compiler in CXX"

# Names and texts of the files that a source includes.
Headers: TypeAlias = tuple[tuple[str, str], ...]
# (name, source, headers) -> the library, or the reason why there is none.
_outcomes: dict[tuple[str, str, Headers], ctypes.CDLL | str] = {}
_lock = threading.Lock()


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded; the message says why."""


def load(source: str, name: str, headers: Headers = ()) -> ctypes.CDLL:
    """The shared library of this C++ source, from the cache folder or compiled now.

    Both outcomes hold for the rest of the process: a source that failed is not compiled again.

    Args:
        source: C++17 with ``extern "C"`` functions; ``#pragma omp`` is honoured.
        name: the beginning of the file's name, an identifier.
        headers: the files that the source includes by name, ``(file name, text)`` each.

    Raises:
        BuildError: no compiler, the compiler's own message, or why the library cannot be loaded.
    """
    key = (name, source, headers)
    outcome = _outcomes.get(key)
    if outcome is None:
        _make_locks_survive_fork()
        with _lock:
            outcome = _outcomes.get(key)
            if outcome is None:
                outcome = _outcomes[key] = _outcome(source, name, headers)
    if isinstance(outcome, str):
        raise BuildError(outcome)
    return outcome


def compiler() -> list[str]:
    """The command that compiles: ``$CXX`` with its flags, else the first of g++, c++ and clang++ on the path.

    Raises:
        BuildError: there is none, or ``CXX`` names none.
    """
    chosen = os.environ.get("CXX", "")
    if not chosen.strip():
        found = next(filter(None, map(shutil.which, COMPILERS)), None)
        if found is None:
            raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the path; {_INSTALL}")
        return [found]
    try:
        program, *flags = shlex.split(chosen)
    except ValueError as error:
        raise BuildError(f"CXX={chosen!r} is not a command: {error}; {_INSTALL}") from None
    path = shutil.which(program)
    if path is None:
        raise BuildError(f"CXX={chosen!r}: {program!r} is not a program on this machine; {_INSTALL}")
    return [path, *flags]


def cache_folder() -> Path | None:
    """The folder of compiled libraries, made where it is missing (mode 0700).

    None, with a warning logged, where there is no folder that only this user can write: each process then compiles in
    a temporary folder of its own.
    """
    try:
        folder = _chosen_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{str(folder)!r} belongs to user {found.st_uid}, not to {os.geteuid()}")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{str(folder)!r} can be written by other users (chmod go-w allows it)")
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        _warn_of_no_cache(error)
        return None
    return folder


def _chosen_folder() -> Path:
    chosen = os.environ.get("SA_HF_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "sa_hf"


def _warn_of_no_cache(error: Exception) -> None:
    logger.warning(
        "Compiled kernels are not kept, each process compiles its own in a temporary folder: %s. Set SA_HF_CACHE_DIR "
        "to a folder that only you can write.",
        str(error).rstrip("."),
    )


def _outcome(source: str, name: str, headers: Headers) -> ctypes.CDLL | str:
    try:
        return _cached_or_built(source, name, headers)
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the files of the build cannot be written or read: {error}; set SA_HF_CACHE_DIR to another folder"


def _cached_or_built(source: str, name: str, headers: Headers) -> ctypes.CDLL:
    if sys.platform == "win32":
        raise BuildError("compiling the CPU kernels is not supported on Windows")
    command = compiler()
    stem = f"{name}-{_fingerprint(source, command, headers)}"
    folder = cache_folder()
    if folder is None:
        return _build(source, headers, command, stem, None)
    return _cached(folder, stem) or _build(source, headers, command, stem, folder)


def _fingerprint(source: str, command: list[str], headers: Headers = ()) -> str:
    """Changes with all that decides the machine code: source, flags, compiler, processor, torch."""
    version = _run([*command, "--version"]).stdout
    flags = (FLAGS, ARCHITECTURES, _openmp_flags(), _link_flags())
    told = (source, headers, flags, command, version, _processor(), torch.__version__)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _processor() -> str:
    """The instruction sets: home folders are shared between machines, and ``native`` code is not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    told = (line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "isa", "cpu"))
    return f"{platform.machine()} {next(told, platform.processor())}"


def _cached(folder: Path, stem: str) -> ctypes.CDLL | None:
    """The library of this stem, if its file is whole and loads.

    The name ends in a hash of the content: loading a truncated library kills the process (SIGBUS), it raises nothing.
    """
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path.stem == f"{stem}-{_content_hash(path)}":
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                logger.warning("%s is built again: it does not load (%s)", path, error)
        else:
            logger.warning("%s is built again: its content is not what was written", path)
            path.unlink(missing_ok=True)
    return None


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _build(source: str, headers: Headers, command: list[str], stem: str, folder: Path | None) -> ctypes.CDLL:
    """Compiles, loads, and only then moves the library to ``folder``, in one step: several processes may do so at once.

    Without a folder it is loaded from a temporary one; a library that is loaded needs its file no more.
    """
    try:
        work = tempfile.TemporaryDirectory(prefix=f".{stem}-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        if folder is None:
            raise
        _warn_of_no_cache(error)
        return _build(source, headers, command, stem, None)
    with work:
        path = _compile(source, command, Path(work.name), headers)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"the compiled library cannot be loaded: {error}{_load_advice(str(error))}") from None
        if folder is not None:
            path.chmod(0o700)
            path.replace(folder / f"{stem}-{_content_hash(path)}.so")
    return library


def _load_advice(message: str) -> str:
    if "__kmpc" in message:  # clang calls LLVM's OpenMP runtime by these names
        return "; the compiler's OpenMP is not the one that torch has loaded: install g++, or name it in CXX"
    if "Operation not permitted" in message or "failed to map" in message:
        return "; where the folder is mounted noexec, set SA_HF_CACHE_DIR to one that is not"
    return ""


def _compile(source: str, command: list[str], work: Path, headers: Headers = ()) -> Path:
    code, compiled, library = work / "kernels.cpp", work / "kernels.o", work / "kernels.so"
    for name, text in (("kernels.cpp", source), *headers):
        (work / name).write_text(text, encoding="utf-8")
    for architecture in ARCHITECTURES:
        words = [*command, *FLAGS, *architecture, *_openmp_flags(), "-c", str(code), "-o", str(compiled)]
        done = _run(words)
        if done.returncode == 0 or not _UNKNOWN_ARCHITECTURE.search(done.stderr):
            break
    _check(words, done)
    # Linking without -fopenmp: see the head of this file.
    words = [*command, "-shared", str(compiled), "-o", str(library), *_link_flags()]
    _check(words, _run(words))
    return library


def _openmp_flags() -> tuple[str, ...]:
    return ("-Xpreprocessor", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)


def _link_flags() -> tuple[str, ...]:
    if sys.platform == "darwin":
        return ("-Wl,-undefined,dynamic_lookup",)
    folder = Path(torch.__file__).parent / "lib"
    return (f"-L{folder}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed", f"-Wl,-rpath,{folder}")


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            timeout=TIMEOUT,
            check=False,
        )
    except OSError as error:
        raise BuildError(f"the compiler does not start: {error}; {_INSTALL}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"the compiler took more than {TIMEOUT} s: {shlex.join(words)}") from None


def _check(words: list[str], done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        said = done.stderr.strip()[-TAIL:] or "(it said nothing)"
        raise BuildError(f"the compiler failed with exit status {done.returncode}: {shlex.join(words)}\n{said}")


@functools.cache
def _make_locks_survive_fork() -> None:
    """A process forked while another thread builds would wait for that thread, which it does not have."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_renew_lock)


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()
