"""Language modelling on texts: fixed chunks for causal models, masked chunks for encoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from sa_hf.tasks.corpus import docstrings, stdlib_sources
from sa_hf.tasks.packed import PackedRows


def stdlib_texts(split: str, kind: str = "source") -> list[str]:
    """Whole files of the standard library, or their docstrings (``kind`` "source" or "docstrings").

    Every tenth file is for evaluation (``split`` "train" or "evaluation").
    """
    return list(_stdlib_texts(split == "evaluation", kind))


@lru_cache(maxsize=4)
def _stdlib_texts(held_out: bool, kind: str) -> tuple[str, ...]:
    sources = [s for i, s in enumerate(stdlib_sources()) if (i % 10 == 9) == held_out]
    return tuple(s.text for s in (sources if kind == "source" else docstrings(sources)))


def token_chunks(texts: Iterable[str], tokenizer: Any, length: int, limit: int | None = None) -> PackedRows:
    """Chunks of exactly ``length`` tokens: texts one after the other, ended by the tokenizer's end token if it has one.

    Every chunk of a tokenizer with a start token (BERT's [CLS], Llama's <s>) begins with it. Stops after ``limit``
    chunks; the rest that fills no chunk is left out. Rows are ``{"input_ids", "attention_mask"}``.
    """
    start, end = start_token(tokenizer), end_token(tokenizer)
    body = length - (start is not None)
    chunks = PackedRows()
    mask = [1] * length
    pending: list[int] = []
    for ids in _token_lists(texts, tokenizer):
        pending += ids if end is None else [*ids, end]
        whole = len(pending) // body * body
        for begin in range(0, whole, body):
            tokens = pending[begin : begin + body]
            chunks.add({"input_ids": tokens if start is None else [start, *tokens], "attention_mask": mask})
            if limit is not None and len(chunks) >= limit:
                return chunks
        del pending[:whole]
    return chunks


def longest_chunk(texts: Iterable[str], tokenizer: Any) -> int:
    """The largest ``length`` at which :func:`token_chunks` fills one chunk of these texts."""
    start, end = start_token(tokenizer) is not None, end_token(tokenizer) is not None
    return start + sum(len(ids) + end for ids in _token_lists(texts, tokenizer))


def start_token(tokenizer: Any) -> int | None:
    """The token that a row begins with: BERT's [CLS], Llama's <s>; None where the tokenizer has none."""
    return _first(tokenizer.cls_token_id, tokenizer.bos_token_id)


def end_token(tokenizer: Any) -> int | None:
    """The token that a text ends with; None where the tokenizer has none."""
    return _first(tokenizer.sep_token_id, tokenizer.eos_token_id)


def _token_lists(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    for text in texts:
        # verbose=False: these texts are longer than the model reads, on purpose; they are cut into chunks.
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _first(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)
