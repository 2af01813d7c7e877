"""The names in a checkpoint: of its files, and of its class; and the folder in which one is written first."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG_FILE = "config.json"
# A folder that holds this is one of sentence-transformers, with a model in it or in folders below (``Router``).
SENTENCES_FILE = "config_sentence_transformers.json"
REMOTE_FILE = "modeling_sa_hf.py"
# The first line of every code file in a checkpoint: what does not begin so is the user's, and is never removed.
HEADER = "# Written by sa_hf into this checkpoint; see modeling_sa_hf.py.\n"
STAGE = ".sa_hf_saving-"
# In front of a class in ``architectures``: who makes a model of that name alone must not find Transformers' dense one.
SPARSE_NAME = "Sparse"


@contextmanager
def stage_in(target: Path) -> Iterator[Path]:
    """A new folder inside ``target``, which is made, too; it is gone after the block."""
    target.mkdir(parents=True, exist_ok=True)
    stage = target / f"{STAGE}{socket.gethostname()}-{os.getpid()}"
    try:
        stage.mkdir()
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def dense_name(architecture: str) -> str:
    """The class of Transformers that an entry of ``architectures`` stands for."""
    return architecture.removeprefix(SPARSE_NAME)
