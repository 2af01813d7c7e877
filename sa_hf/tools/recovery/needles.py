"""Retrieval: lines with a key that is asked for later, in the text of the standard library.

A line is four tokens: the marker, a name, and a key of two numbers. The question is the marker and the name again; the
answer is right where both numbers of the key are the model's first choice, each with those before it given, which is
when greedy decoding gives it whole. The marker, names and numbers have tokens of their own behind the text's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NAMES, NUMBERS, KEY = 32, 32, 2  # each place of a key has numbers of its own
LINE = 2 + KEY  # tokens of a line
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Needles:
    """The tokens of lines: ids from ``first`` on, which is the size of the text's vocabulary."""

    first: int

    @property
    def vocab_size(self) -> int:
        return self.first + 1 + NAMES + KEY * NUMBERS

    def question(self, name: int) -> list[int]:
        return [self.first, self.first + 1 + name]

    def key(self, rng: random.Random) -> list[int]:
        return [self.first + 1 + NAMES + place * NUMBERS + rng.randrange(NUMBERS) for place in range(KEY)]

    def row(self, text: Sequence[int], length: int, lines: int, rng: random.Random) -> list[int]:
        """A training row of ``length`` tokens: ``lines`` lines of different names, each twice, at random places of the
        text, which has at least ``length - 2 * LINE * lines`` tokens."""
        body = length - 2 * LINE * lines
        told = [self.question(name) + self.key(rng) for name in rng.sample(range(NAMES), lines)]
        places = sorted(rng.randint(0, body) for _ in range(2 * lines))
        slots = rng.sample(range(2 * lines), 2 * lines)
        return _with(text[:body], [(places[slot], slot, told[at // 2]) for at, slot in enumerate(slots)])

    def repeated(self, row: Sequence[int]) -> list[int]:
        """The places of keys in a row whose line stood there before: what can be copied."""
        seen: set[int] = set()
        found = []
        for at, token in enumerate(row[: len(row) - LINE + 1]):
            if token == self.first:
                found += list(range(at + 2, at + LINE)) if row[at + 1] in seen else []
                seen.add(row[at + 1])
        return found

    def prompt(
        self, text: Sequence[int], length: int, depth: float, lines: int, rng: random.Random
    ) -> tuple[list[int], list[int]]:
        """A prompt of ``length`` tokens that ends with the question, and the key.

        Args:
            depth: where the line that is asked for stands, 0 the beginning and 1 the end of the text.
            lines: how many there are, the others at random places.
        """
        names = rng.sample(range(NAMES), lines)
        keys = [self.key(rng) for _ in names]
        body = length - LINE * lines - 2
        places = [round(depth * body), *(rng.randint(0, body) for _ in names[1:])]
        inserted = [
            (place, at, self.question(name) + key)
            for at, (place, name, key) in enumerate(zip(places, names, keys, strict=True))
        ]
        return _with(text[:body], inserted) + self.question(names[0]), keys[0]


def _with(text: Sequence[int], inserted: list[tuple[int, int, list[int]]]) -> list[int]:
    """The text with lines put in front of the tokens at their places, in the order of (place, number)."""
    found: list[int] = []
    done = 0
    for place, _, line in sorted(inserted):
        found += [*text[done:place], *line]
        done = place
    return [*found, *text[done:]]


@dataclass(frozen=True)
class Retrieval:
    """Prompts at every length and depth, ``each`` of a pair; ``lines`` 1 is the passkey task, more is multi-needle."""

    lines: int
    lengths: tuple[int, ...]
    each: int
    seed: int = 0

    def cells(self) -> list[tuple[int, float]]:
        """(length, depth) of the groups of ``each`` prompts, in their order."""
        return [(length, depth) for length in self.lengths for depth in DEPTHS]

    @torch.no_grad()
    def hits(self, model: nn.Module, needles: Needles, text: Sequence[int], batch_tokens: int = 16384) -> list[bool]:
        """Which prompts are answered, in the order of :meth:`cells`; ``text`` is held-out text of the task."""
        rng = random.Random(f"retrieval {self.lines} {self.seed}")
        found: list[bool] = []
        for length, depth in self.cells():
            prompts, keys = [], []
            for _ in range(self.each):
                start = rng.randrange(max(1, len(text) - length))
                prompt, key = needles.prompt(text[start : start + length], length, depth, self.lines, rng)
                prompts.append(prompt + key)
                keys.append(key)
            device = next(model.parameters()).device
            ids, wanted = torch.tensor(prompts, device=device), torch.tensor(keys, device=device)
            size = max(1, batch_tokens // ids.shape[1])
            for rows, answers in zip(ids.split(size), wanted.split(size), strict=True):
                found += right_answers(model, rows, answers).tolist()
        return found


def right_answers(model: nn.Module, ids: Tensor, answers: Tensor) -> Tensor:
    """Which rows a causal model answers: ``ids [B, n]`` end with ``answers [B, k]``; bool ``[B]``."""
    count = answers.shape[1]
    logits: Tensor = model(input_ids=ids[:, :-1], logits_to_keep=count, use_cache=False).logits
    return (logits[:, -count:].argmax(-1) == answers).all(-1)
