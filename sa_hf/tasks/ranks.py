"""What the scripts tell their user: once, whatever the number of processes, and beside the results on stdout."""

from __future__ import annotations

import os
import sys


def is_main() -> bool:
    """Whether this is the first process of a launch (``RANK`` as torchrun and accelerate set it), or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a line to stderr, in the first process alone; stdout is for results."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def quiet_others() -> None:
    """Errors alone from Transformers and datasets in all processes but the first."""
    if is_main():
        return
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
