"""The standard library's files in three splits that share no file: to train on, to choose settings on, to report on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from sa_hf.config import did_you_mean
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.corpus import Source, stdlib_sources

Split = Literal["train", "tuning", "report"]
SPLITS: tuple[Split, ...] = ("train", "tuning", "report")
# Of ten files in the order of their paths.
PARTS: dict[Split, range] = {"train": range(6), "tuning": range(6, 7), "report": range(7, 10)}


def sources_of(split: str) -> list[Source]:
    """The files of a split, in the order of their paths.

    Raises:
        SparseAttentionError: there is no such split, or this Python has no standard library in files.
    """
    if split not in SPLITS:
        raise SparseAttentionError(f"split={split!r}{did_you_mean(split, SPLITS)} must be one of {list(SPLITS)}")
    return [source for at, source in enumerate(stdlib_sources()) if at % 10 in PARTS[split]]


def corpus_digest() -> str:
    """Twelve hexadecimal digits of all files: another Python has another corpus."""
    total = hashlib.sha256()
    for source in stdlib_sources():
        total.update(f"{source.path}\0{source.text}\0".encode())
    return total.hexdigest()[:12]


def trained_tokenizer(vocab_size: int, path: Path) -> Any:
    """A byte-level BPE of the training files (``tokenizers.Tokenizer``), kept at ``path``; any text comes back whole.

    Raises:
        SparseAttentionError: the vocabulary would not hold the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 256:
        raise SparseAttentionError(f"vocab_size={vocab_size} must hold the 256 bytes; nearest: 256")
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((source.text for source in sources_of("train")), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer
