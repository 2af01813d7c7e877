"""A classification task that needs the whole of a long document: which package is it mostly about?

A document is made of ``sections`` real excerpts from the standard library's source, each about as long as the 512
tokens that MiniLM reads. ``majority`` of them come from one package, the label; every other one comes from a package
of its own. They stand in random order, so that a model that sees the first section alone is right at most about
``majority / sections`` of the time, while the whole document decides the label.

The last quarter of every file's sections serves evaluation alone: no line of an evaluation document was trained on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Literal

from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.corpus import package_sources, sections

TOPICS = ("asyncio", "email", "multiprocessing", "unittest", "xml")
EVALUATION_SHARE = 0.25

Split = Literal["train", "evaluation"]


@dataclass(frozen=True)
class TopicTask:
    """The shape of the documents.

    Args:
        sections: excerpts per document.
        majority: how many of them come from the label's package.
        section_size: least characters of an excerpt; with MiniLM's tokenizer 1,850 characters are about 480 tokens.
        topics: the packages, which are the classes; label ``i`` is ``topics[i]``.

    Raises:
        SparseAttentionError: the label would not be the strict majority, or there are too few topics.
    """

    sections: int = 8
    majority: int = 5
    section_size: int = 1850
    topics: tuple[str, ...] = TOPICS

    def __post_init__(self) -> None:
        others = self.sections - self.majority
        if not (2 <= self.majority <= self.sections and others < len(self.topics)):
            raise SparseAttentionError(
                f"majority={self.majority} of {self.sections} sections must be at least 2 and leave at most "
                f"{len(self.topics) - 1} to the other topics; nearest: {max(2, self.sections - len(self.topics) + 1)}"
            )

    def documents(self, split: Split, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """``count`` documents ``{"text": str, "label": int}``, the labels as even as ``count`` allows."""
        rng = random.Random(f"{split} {seed}")
        pools = _pools(self.topics, self.section_size, split)
        rows = []
        for label in self._labels(count, rng):
            others = [t for t in range(len(self.topics)) if t != label]
            chosen = [label] * self.majority + rng.sample(others, self.sections - self.majority)
            rng.shuffle(chosen)
            rows.append({"text": "\n".join(rng.choice(pools[topic]) for topic in chosen), "label": label})
        return rows

    def short_texts(self, split: Split, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """``count`` texts that 512 tokens hold, ``{"text": str, "label": int}``: every other one is a single excerpt,
        the rest are whole documents of excerpts an eighth as long."""
        short = replace(self, section_size=self.section_size // self.sections)
        halves = self._single(split, (count + 1) // 2, seed), short.documents(split, count // 2, seed)
        return [row for pair in zip_longest(*halves) for row in pair if row is not None]

    def _single(self, split: Split, count: int, seed: int) -> list[dict[str, Any]]:
        rng = random.Random(f"sections {split} {seed}")
        pools = _pools(self.topics, self.section_size, split)
        return [{"text": rng.choice(pools[label]), "label": label} for label in self._labels(count, rng)]

    def _labels(self, count: int, rng: random.Random) -> list[int]:
        labels = [i % len(self.topics) for i in range(count)]
        rng.shuffle(labels)
        return labels


@lru_cache(maxsize=8)
def _pools(topics: tuple[str, ...], size: int, split: Split) -> tuple[tuple[str, ...], ...]:
    """The excerpts of each topic in one split."""
    pools = []
    for sources in package_sources(topics).values():
        pool: list[str] = []
        for source in sources:
            pieces = sections(source.text, size)
            train = len(pieces) - int(len(pieces) * EVALUATION_SHARE)
            pool += pieces[:train] if split == "train" else pieces[train:]
        pools.append(tuple(pool))
    return tuple(pools)
