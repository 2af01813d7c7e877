"""The topic task: what its documents are made of, and that evaluation text is never trained on."""

from __future__ import annotations

from collections import Counter

import pytest

from sa_hf import SparseAttentionError
from sa_hf.tasks.corpus import package_sources
from sa_hf.tasks.topic import TopicTask

TASK = TopicTask(sections=4, majority=2, section_size=400, topics=("asyncio", "email", "http"))


@pytest.fixture(scope="module")
def packages() -> dict[str, str]:
    return {name: "\0".join(s.text for s in sources) for name, sources in package_sources(TASK.topics).items()}


def test_the_label_is_the_strict_majority_of_real_sections(packages: dict[str, str]) -> None:
    for row in TASK.documents("train", 12):
        found = Counter(name for piece in pieces(row["text"]) for name, text in packages.items() if piece in text)
        name, times = found.most_common(1)[0]
        assert name == TASK.topics[row["label"]]
        assert times >= 2
        assert all(n < times for other, n in found.items() if other != name)


def pieces(document: str) -> list[str]:
    """One long line from the middle of each quarter of a document: enough to find where the quarter comes from."""
    quarter = len(document) // 4
    found = []
    for start in range(0, 4 * quarter, quarter):
        lines = document[start : start + quarter].split("\n")[2:-2]
        found.append(max(lines, key=len))
    return found


def test_labels_are_even_and_rows_repeat_for_a_seed() -> None:
    rows = TASK.documents("train", 12, seed=3)
    assert Counter(r["label"] for r in rows) == {0: 4, 1: 4, 2: 4}
    assert rows == TASK.documents("train", 12, seed=3)
    assert rows != TASK.documents("train", 12, seed=4)


def test_evaluation_sections_are_not_in_training() -> None:
    from sa_hf.tasks.topic import _pools

    train, evaluation = (_pools(TASK.topics, TASK.section_size, split) for split in ("train", "evaluation"))
    for trained, held_out in zip(train, evaluation, strict=True):
        assert held_out
        assert set(trained).isdisjoint(held_out)


def test_the_first_section_alone_leaves_the_label_open() -> None:
    """Over many documents the first section's package is the label about majority / sections of the time."""
    rows = TopicTask().documents("evaluation", 400)
    sources = package_sources(TopicTask().topics)
    texts = ["\0".join(s.text for s in sources[name]) for name in TopicTask().topics]
    right = sum(max(r["text"][:1500].split("\n"), key=len) in texts[r["label"]] for r in rows) / len(rows)
    assert 5 / 8 - 0.1 < right < 5 / 8 + 0.1


def test_short_texts_are_excerpts_and_documents_of_short_excerpts(packages: dict[str, str]) -> None:
    rows = TASK.short_texts("train", 6)
    for single in rows[::2]:
        assert single["text"] in packages[TASK.topics[single["label"]]]
    for document in rows[1::2]:
        assert not any(document["text"] in text for text in packages.values())
        assert 400 <= len(document["text"]) < 800


@pytest.mark.parametrize("fields", [{"sections": 4, "majority": 1}, {"sections": 9, "majority": 2}])
def test_a_label_that_is_no_majority_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(SparseAttentionError, match=r"majority=.*nearest"):
        TopicTask(**fields)
