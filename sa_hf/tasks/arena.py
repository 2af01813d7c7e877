"""ListOps as Long Range Arena makes it (Tay et al. 2021, arXiv 2011.04006, section 2.2.1; Nangia and Bowman 2018).

The generator is that of the arena's public code, ``lra_benchmarks/data/listops.py``: below ``depth`` a place is a list
with probability 0.25, else a digit; a list has 2 to ``arguments`` places and one of four operators; trees outside the
wanted lengths are thrown away. As its reader does, brackets of the binary form are left out: tokens are operators with
their opening bracket, digits, and the closing bracket.

The arena's byte-level text classification needs no generator: a model of bytes (``tiny-bert``) and texts with classes,
see ``scripts/configs/lra_text.yaml``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sa_hf.errors import SparseAttentionError

OPERATORS = ("MIN", "MAX", "MED", "SM")
LIST_PROBABILITY = 0.25
MOST_IN_VAIN = 200_000
# Token ids: 0 padding, 1 the leading [CLS], 2 the closing bracket, 3 to 6 the operators, 7 to 16 the digits.
CLS, CLOSE, FIRST_OPERATOR, FIRST_DIGIT, VOCABULARY = 1, 2, 3, 7, 17


@dataclass(frozen=True)
class ListOpsTask:
    """Nested lists of digits; the class is the value, 0 to 9.

    Args:
        max_length: most tokens of a row, with the leading [CLS]; the arena's is 2,000.
        min_length: fewest; None is a quarter of ``max_length``, as the arena's 500 are.
        depth: most nested lists; the arena's is 10.
        arguments: most places of a list; the arena's is 10.

    Raises:
        SparseAttentionError: no tree has such a length.
    """

    max_length: int = 2000
    min_length: int | None = None
    depth: int = 10
    arguments: int = 10

    num_labels = 10
    vocab_size = VOCABULARY

    def __post_init__(self) -> None:
        if self.depth < 2 or self.arguments < 2:
            raise SparseAttentionError(
                f"depth={self.depth} and arguments={self.arguments} must be at least 2; nearest: depth="
                f"{max(2, self.depth)}, arguments={max(2, self.arguments)}"
            )
        longest = 1
        for _ in range(self.depth - 1):
            longest = 2 + self.arguments * longest
        longest += 1  # the leading [CLS]
        if not 5 <= self.shortest <= self.max_length or self.shortest > longest:
            raise SparseAttentionError(
                f"min_length={self.shortest} and max_length={self.max_length} must satisfy 5 <= min_length <= "
                f"max_length, and min_length <= {longest} at this depth; nearest: min_length="
                f"{min(max(5, self.shortest), self.max_length, longest)}, max_length={max(5, self.max_length)}"
            )

    @property
    def shortest(self) -> int:
        return max(5, self.max_length // 4) if self.min_length is None else self.min_length

    def rows(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """``count`` different rows ``{"input_ids", "attention_mask", "labels"}`` of differing lengths."""
        rng = random.Random(f"listops {seed}")
        rows: dict[tuple[int, ...], dict[str, Any]] = {}
        in_vain = 0
        while len(rows) < count:
            before = len(rows)
            ids, value = self._tree(rng, 1, self.max_length - 1)
            if ids is not None and self.shortest <= len(ids) + 1:
                found = [CLS, *ids]
                rows[tuple(found)] = {"input_ids": found, "attention_mask": [1] * len(found), "labels": value}
            in_vain = 0 if len(rows) > before else in_vain + 1
            if in_vain > MOST_IN_VAIN:
                raise SparseAttentionError(
                    f"{MOST_IN_VAIN:,} trees in turn gave no new one of {self.shortest} to {self.max_length} tokens "
                    f"after {len(rows)} of {count}; ask for fewer rows, or let lengths and depth differ more"
                )
        return list(rows.values())

    def _tree(self, rng: random.Random, depth: int, room: int) -> tuple[list[int] | None, int]:
        """A place's tokens and value; None where it would hold more than ``room`` tokens."""
        if depth >= self.depth or rng.random() > LIST_PROBABILITY:
            digit = rng.randrange(10)
            return ([FIRST_DIGIT + digit] if room >= 1 else None), digit
        places = rng.randint(2, self.arguments)
        ids: list[int] = []
        values = []
        for _ in range(places):
            inner, value = self._tree(rng, depth + 1, room - 2 - len(ids))
            if inner is None:
                return None, 0
            ids += inner
            values.append(value)
        operator = rng.choice(OPERATORS)
        return [FIRST_OPERATOR + OPERATORS.index(operator), *ids, CLOSE], value_of(operator, values)


def value_of(operator: str, values: list[int]) -> int:
    """MIN, MAX, MED (the median, halves cut), or SM (the sum modulo 10) of digits."""
    if operator == "MIN":
        return min(values)
    if operator == "MAX":
        return max(values)
    if operator == "SM":
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2
