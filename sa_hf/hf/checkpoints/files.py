"""The names in a checkpoint: of its files, and of its class."""

from __future__ import annotations

CONFIG_FILE = "config.json"
# A folder that holds this is one of sentence-transformers, with a model in it or in folders below (``Router``).
SENTENCES_FILE = "config_sentence_transformers.json"
REMOTE_FILE = "modeling_sa_hf.py"
# The first line of every code file in a checkpoint: what does not begin so is the user's, and is never removed.
HEADER = "# Written by sa_hf into this checkpoint; see modeling_sa_hf.py.\n"
STAGE = ".sa_hf_saving-"
# In front of a class in ``architectures``: who makes a model of that name alone must not find Transformers' dense one.
SPARSE_NAME = "Sparse"


def dense_name(architecture: str) -> str:
    """The class of Transformers that an entry of ``architectures`` stands for."""
    return architecture.removeprefix(SPARSE_NAME)
