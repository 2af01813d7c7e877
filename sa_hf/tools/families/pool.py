"""Each entry in a process of its own, forked after the imports, within limits of time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import sa_hf
from sa_hf.hf.checkpoints.flatten import ROOT, carried_files
from sa_hf.tools.families.check import FIRST, build, check
from sa_hf.tools.families.compare import ERROR, NOT_BUILT, Result, outputs
from sa_hf.tools.families.registry import Entry, entries

SECONDS, MEMORY = 90, 8 * 2**30
_FORK = multiprocessing.get_context("fork")


@dataclass(eq=False)
class _Job:
    entry: Entry
    process: Any
    results: Connection
    deadline: float


def run(todo: Iterable[Entry], *, jobs: int, quick: bool) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """What :func:`check` finds of each entry, as it comes."""
    _warm()
    waiting = iter(todo)
    running: list[_Job] = []
    while True:
        while len(running) < jobs and (entry := next(waiting, None)) is not None:
            running.append(_start(entry, quick))
        if not running:
            return
        left = max(0.0, min(job.deadline for job in running) - time.monotonic())
        wait([job.results for job in running], timeout=left)
        for job in list(running):
            found = _result(job)
            if found is not None:
                running.remove(job)
                yield job.entry, found


def _warm() -> None:
    """Do once what every process would. No gradients: their threads are not there after a fork."""
    carried_files(ROOT)
    model, inputs = build(next(entry for entry in entries() if entry.name == "BertModel"))
    outputs(sa_hf.patch_model(model, FIRST), inputs)


def _start(entry: Entry, quick: bool) -> _Job:
    here, there = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_work, args=(entry, quick, there), daemon=True)
    process.start()
    there.close()
    return _Job(entry, process, here, time.monotonic() + SECONDS)


def _work(entry: Entry, quick: bool, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    results.send(check(entry, quick=quick).to_dict())
    results.close()


def _result(job: _Job) -> dict[str, Any] | None:
    """What a job has sent, or why it sent nothing; None while it runs."""
    found: dict[str, Any] | None = None
    if job.results.poll():
        try:
            found = job.results.recv()
        except EOFError:
            job.process.join()
            found = Result(ERROR, f"its process ended with code {job.process.exitcode}").to_dict()
    elif time.monotonic() >= job.deadline:
        job.process.kill()
        found = Result(NOT_BUILT, f"took more than {SECONDS} seconds", seconds=float(SECONDS)).to_dict()
    if found is not None:
        job.process.join()
        job.results.close()
    return found
