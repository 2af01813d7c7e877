"""The embedded corpus: cut at line ends, docstrings without importing, chunks of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sa_hf import SparseAttentionError
from sa_hf.tasks.corpus import docstrings, package_sources, sections, stdlib_sources
from sa_hf.tasks.language import stdlib_texts, token_chunks


class Characters:
    """A tokenizer that reads one character per token."""

    def __init__(self, start: int | None, end: int | None) -> None:
        self.cls_token_id, self.sep_token_id = start, end
        self.bos_token_id = self.eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def test_sources_are_the_library_without_its_tests() -> None:
    by_path = {s.path: s.text for s in stdlib_sources()}
    assert by_path["json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")
    assert not [p for p in by_path if p.startswith(("test/", "site-packages/")) or "/test/" in p]
    assert list(by_path) == sorted(by_path, key=lambda p: p.split("/"))


def test_docstrings_hold_a_known_one() -> None:
    found = docstrings(package_sources(["json"])["json"])
    assert any(s.path.startswith("json/__init__.py:") and "to a JSON formatted ``str``" in s.text for s in found)


def test_sections_end_at_lines_and_lose_only_the_rest() -> None:
    assert sections("ab\ncd\nefgh\ni\n", 4) == ["ab\ncd\n", "efgh\n"]
    assert sections("", 4) == []


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(SparseAttentionError, match="no_such_package"):
        package_sources(["json", "no_such_package"])


def test_language_splits_are_disjoint_and_whole() -> None:
    train, evaluation = stdlib_texts("train"), stdlib_texts("evaluation")
    assert len(train) + len(evaluation) == len(stdlib_sources())
    assert 0.05 < len(evaluation) / len(train) < 0.2


def test_chunks_follow_each_other_with_start_and_end_tokens() -> None:
    chunks = token_chunks(["abc", "de"], Characters(start=1, end=2), length=4)
    a, b, c, d, e = (ord(x) for x in "abcde")
    assert [r["input_ids"].tolist() for r in chunks] == [[1, a, b, c], [1, 2, d, e]]
    assert all(r["attention_mask"].tolist() == [1, 1, 1, 1] for r in chunks)


def test_chunks_without_special_tokens_stop_at_the_limit() -> None:
    chunks = token_chunks(["abcdefgh", "ijkl"], Characters(None, None), length=3, limit=2)
    assert ["".join(map(chr, r["input_ids"].tolist())) for r in chunks] == ["abc", "def"]
