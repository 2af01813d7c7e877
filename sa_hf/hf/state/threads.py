"""What a forward keeps while it runs, apart for each thread that runs the model."""

from __future__ import annotations

import threading
from typing import Any

import torch


class Running:
    """A value of the running forward, None outside of one. Several threads may run a model in evaluation: each sees its
    own. torch.compile traces no thread's number, so that its code reads what was set last, and what it has set itself
    holds in the parts of its forward that are left to Python.
    """

    def __init__(self) -> None:
        self.by_thread: dict[int, Any] = {}
        self.last: Any = None
        self.traced: Any = None

    def get(self) -> Any:
        if torch.compiler.is_compiling():
            return self.last
        return self.by_thread.get(threading.get_ident(), self.traced)

    def set(self, value: Any) -> None:
        self.last = value
        if torch.compiler.is_compiling():
            self.traced = value
        elif value is not None:
            self.by_thread[threading.get_ident()] = value
        elif self.by_thread.pop(threading.get_ident(), None) is None:
            self.traced = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy runs nothing."""
        return {"by_thread": {}, "last": None, "traced": None}
