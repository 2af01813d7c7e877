"""Which files and splits serve training and which are held out, by the words in their names.

The words are those of ``datasets.load_dataset(folder)``, as whole words in names of files and of folders. That function
takes the first of its patterns that fits any file: it leaves out ``corpus.txt`` beside ``validation/``, and gives
``train_test.txt`` to two splits. Here each file is of one split, and one with a word of a held-out split is held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sa_hf.errors import SparseAttentionError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# What is evaluated on, the first that is there.
HELD_OUT = (VALIDATION, TEST)
SHOWN_FILES = 3


def split_of(name: str | Path) -> str | None:
    """The split that a path below the data set's folder, or the name of a split, belongs to; None where it says none.

    Held-out words win over training's, and of two held-out words the one nearest to the file's own name.
    """
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    found = None
    for part in Path(name).parts:
        words = set(re.split(f"[{NON_WORDS_CHARS}]+", part.lower()))
        for split, keywords in SPLIT_KEYWORDS.items():
            if words.intersection(keywords) and (str(split) != TRAIN or found is None):
                found = str(split)
    return found


def by_split(files: Sequence[Path], root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Files by split, and those that are left out.

    Files that name no split are for training; where others do name the training split, they are left out.
    """
    splits: dict[str, list[Path]] = {}
    unnamed = []
    for path in files:
        split = split_of(path.relative_to(root))
        if split is None:
            unnamed.append(path)
        else:
            splits.setdefault(split, []).append(path)
    if unnamed and TRAIN not in splits:
        return {TRAIN: unnamed, **splits}, []
    return {name: splits[name] for name in (TRAIN, *HELD_OUT) if name in splits}, unnamed


def held_out_of(splits: Iterable[str], wanted: str | None) -> str | None:
    """The split to evaluate on: ``wanted``, else validation, else test, else None.

    Raises:
        SparseAttentionError: ``wanted`` is not there.
    """
    splits = list(splits)
    if wanted is not None and wanted not in splits:
        raise SparseAttentionError(f"eval_split={wanted!r} is not there; splits: {splits}")
    return wanted or next((name for name in HELD_OUT if name in splits), None)


def named(files: Sequence[Path], root: Path) -> str:
    """Files for a message: how many, and the first few by name."""
    names = [str(path.relative_to(root)) for path in files]
    more = f", and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    return f"{len(names)} file{'s' * (len(names) != 1)} ({', '.join(names[:SHOWN_FILES])}{more})"
