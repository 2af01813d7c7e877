"""Caches of other libraries where the user has no home, or one that cannot be written."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sa_hf.tasks.ranks import say

HOME = "HF_HOME"
# Below HF_HOME; the hub's own cache stays where it is, for what is in it can be read.
BELOW_HOME = {"HF_MODULES_CACHE": "modules", "HF_DATASETS_CACHE": "datasets"}
TRITON = "TRITON_CACHE_DIR"


def unusable_caches(environment: Mapping[str, str]) -> list[str]:
    """The variables of those caches of Hugging Face and Triton that cannot be written where they are by default.

    A variable that is set is the user's choice and is not in the list. ``HF_HOME`` alone stands for all that is below
    it where there is no home at all: Hugging Face's libraries would make a folder named "~" here.
    """
    base = Path(environment.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(os.path.expanduser(environment.get(HOME) or base / "huggingface"))
    triton = Path(os.path.expanduser(environment.get("TRITON_HOME") or "~")) / ".triton"
    if HOME not in environment and not home.is_absolute():
        found = [HOME]
    else:
        found = [v for v, below in BELOW_HOME.items() if v not in environment and not _can_be_written(home / below)]
    return found + [TRITON] * (TRITON not in environment and not _can_be_written(triton))


def _can_be_written(folder: Path) -> bool:
    """Whether a folder, or the nearest one above that is there, takes new files."""
    if not folder.is_absolute():
        return False
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def spare_caches() -> None:
    """Send what cannot be written to a temporary folder, removed at the end, and say so.

    To be called before transformers, datasets or Triton are imported: they read their variables then.
    """
    variables = unusable_caches(os.environ)
    if not variables:
        return
    folder = _temporary_folder()
    for variable in variables:
        os.environ[variable] = str(Path(folder.name) / variable.lower())
    say(
        f"caches: no home that can be written, so {' and '.join(variables)} lie in a temporary folder for this run; "
        f"set {HOME} to a folder that you can write"
    )


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sa_hf-caches-", ignore_cleanup_errors=True)
