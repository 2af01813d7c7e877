"""A device that failed fails all that its process asks of it afterwards; a new process has a device that works."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

DEADLINE = "SA_HF_SUITE_DEADLINE"  # of ``time.monotonic``, whose clock goes on through a restart
# What a restart asks for no more: its own rows would go, and the table that was tuned is there.
ONCE = ("--fresh", "--tune")


class DeviceLost(Exception):
    """The device itself failed; what was measured up to there is saved, and what it failed on is marked."""


def device_error(device: torch.device) -> str | None:
    """What the device failed with, or None: it works."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def deadline_before() -> float | None:
    """The deadline of the run that this process goes on with, or None: it is the first."""
    found = os.environ.get(DEADLINE)
    return None if found is None else float(found)


def restart(deadline: float, argv: Sequence[str] = sys.argv) -> NoReturn:
    """Start the program again in place of this process; it goes on with the rows that are saved."""
    os.environ[DEADLINE] = repr(deadline)
    # A file of the driver that stayed open would keep the failed context and its memory.
    for name in os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else ():
        if int(name) > 2 and Path(f"/proc/self/fd/{name}").exists():
            os.set_inheritable(int(name), False)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *(word for word in argv if word not in ONCE)])
