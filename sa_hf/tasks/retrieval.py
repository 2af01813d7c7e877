"""Retrieval from long texts after RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3 and appendix B), for causal
language models: needles in a haystack, and variables to be tracked.

The wording and the haystack of noise are those of the paper's code; keys are made of syllables in place of its list of
words, so that nothing is downloaded. Rows are put together of tokens and not of text, so each has exactly the length
asked for. Answers stand at a row's end, each after a blank, in the order of the text. An answer is right where the
model's likeliest token is the answer's at each of its positions, given the row up to there: what greedy decoding
would write. (The paper generates, and looks for the answers in any order.)
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sa_hf.config import did_you_mean
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.files import KINDS as FILE_KINDS
from sa_hf.tasks.files import TEXT, find_files
from sa_hf.tasks.language import start_token, stdlib_texts
from sa_hf.tasks.synthetic import IGNORED

Kind = Literal["single", "multi_key", "multi_value", "variables"]
KINDS = get_args(Kind)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Wording:
    """The texts around needles: before the haystack, of a needle, and of the question; each ends where the next begins.

    ``link`` is the needle of a variable that takes another's value.
    """

    before: str
    needle: str
    link: str
    question: str


_SINGLE = Wording(
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n",
    "One of the special magic numbers for {key} is: {value}.\n",
    "",
    "What is the special magic number for {key} mentioned in the provided text? The special magic number for {key} "
    "mentioned in the provided text is",
)
_SEVERAL = Wording(
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n",
    _SINGLE.needle,
    "",
    "What are all the special magic numbers for {key} mentioned in the provided text? The special magic numbers for "
    "{key} mentioned in the provided text are",
)
_VARIABLES = Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "VAR {key} = {value}\n",
    "VAR {key} = VAR {other}\n",
    "Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:",
)
# For small models, and contexts of a few hundred bytes.
_SHORT = Wording("", "The code of {key} is {value}.\n", "", "The code of {key} is")
_SHORT_VARIABLES = Wording("", _VARIABLES.needle, _VARIABLES.link, "Variables of {value}:")


@dataclass(frozen=True)
class Answer:
    """One answer of a row: its tokens ``[begin, end)``, and where its needle stands in the haystack, from 0 to 1."""

    begin: int
    end: int
    depth: float


@dataclass(frozen=True)
class Sample:
    """One row: its tokens, and the answers at their end."""

    input_ids: list[int]
    answers: tuple[Answer, ...]

    def row(self) -> dict[str, Any]:
        """``{"input_ids", "attention_mask", "labels"}`` of one length; only the answers are predicted."""
        labels = [IGNORED] * len(self.input_ids)
        for answer in self.answers:
            labels[answer.begin : answer.end] = self.input_ids[answer.begin : answer.end]
        return {"input_ids": self.input_ids, "attention_mask": [1] * len(labels), "labels": labels}


class Haystack:
    """Lines of text as tokens, for one tokenizer; without texts, the paper's noise.

    Args:
        texts: what the needles are hidden in, e.g. ``stdlib_texts("evaluation")``; lines of more than ``LONGEST``
            characters are left out.

    Raises:
        SparseAttentionError: the texts hold no line.
    """

    LONGEST = 400

    def __init__(self, tokenizer: Any, texts: Sequence[str] | None = None) -> None:
        self.tokenizer = tokenizer
        whole = [NOISE] if texts is None else texts
        lines = ([line for line in text.splitlines(keepends=True) if line.strip()] for text in whole)
        kept = ([line for line in text if len(line) <= self.LONGEST] for text in lines)
        self._texts = [text for text in kept if text]
        self._lines: dict[int, list[list[int]]] = {}
        if not self._texts:
            raise SparseAttentionError(
                f"the haystack holds no line of at most {self.LONGEST} characters; give other texts, or None for the "
                "paper's noise"
            )

    def lines(self, rng: random.Random, tokens: int) -> list[list[int]]:
        """Lines of together exactly ``tokens`` tokens, from a drawn text and a drawn line in it on; the last is cut."""
        found: list[list[int]] = []
        left = tokens
        while left > 0:
            lines = self._tokenized(rng.randrange(len(self._texts)))
            for line in lines[rng.randrange(len(lines)) :]:
                found.append(line[:left])
                left -= len(found[-1])
                if left <= 0:
                    break
        return found

    def _tokenized(self, text: int) -> list[list[int]]:
        if text not in self._lines:
            found = self.tokenizer(self._texts[text], add_special_tokens=False, verbose=False)["input_ids"]
            self._lines[text] = [ids for ids in found if ids]
        return self._lines[text]


def haystack_texts(name: str, split: str | None = None) -> list[str] | None:
    """What a :class:`Haystack` takes, by its name.

    Args:
        name: "noise" (None, the paper's), "stdlib" (docstrings of the standard library), or a path of the user's: a
            file or a folder of .txt, .md and .py files in UTF-8.
        split: of texts to train on and to evaluate on, "train" or "evaluation"; of each of the user's texts the last
            tenth of its lines is held out. None: for evaluation alone, all of it.

    Raises:
        SparseAttentionError: no such name or path, no text in it, or a file in another encoding.
    """
    if name == "noise":
        return None
    if name == "stdlib":
        return stdlib_texts(split or "evaluation", "docstrings")
    texts = [_held_out(_decoded(path), split) for path in haystack_files(name)]
    if not any(text.strip() for text in texts):
        suffixes = sorted(suffix for suffix, kind in FILE_KINDS.items() if kind == TEXT)
        raise SparseAttentionError(
            f"haystack={name!r} holds no text for {split or 'evaluation'}; give {suffixes} files"
        )
    return texts


def haystack_files(name: str) -> list[Path]:
    """The user's files that a haystack is made of; none of "stdlib" and "noise".

    Raises:
        SparseAttentionError: no such name or path.
    """
    if name in ("stdlib", "noise"):
        return []
    root = Path(name).expanduser()
    if not root.exists():
        raise SparseAttentionError(
            f"haystack={name!r} must be 'stdlib', 'noise', or a file or folder of texts, and there is none; nearest: "
            "'stdlib'"
        )
    return [path for path in find_files(root) if FILE_KINDS.get(path.suffix) == TEXT]


def _decoded(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise SparseAttentionError(
            f"haystack: {path} is not in UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def _held_out(text: str, split: str | None) -> str:
    """A text's lines of a split: nine tenths of them, or the rest."""
    lines = text.splitlines(keepends=True)
    cut = -(-9 * len(lines) // 10)
    return text if split is None else "".join(lines[cut:] if split == "evaluation" else lines[:cut])


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """One kind of retrieval.

    Args:
        kind: "single": one key and its number. "multi_key": ``needles`` keys with a number each, one of them asked for.
            "multi_value": one key with ``needles`` numbers, all asked for. "variables": a chain of ``needles``
            variables that hold one number, beside a chain of as many that hold another; all of the first are asked for.
        needles: >= 1; of "single" always 1.
        digits: of a number.
        wording: "ruler", the paper's, or "short", about a third as long, for small models.

    Raises:
        SparseAttentionError: an unknown kind or wording, too few needles or digits.
    """

    kind: Kind = "single"
    needles: int = 4
    digits: int = 7
    wording: Literal["ruler", "short"] = "ruler"

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("wording", self.wording, ("ruler", "short"))):
            if value not in known:
                raise SparseAttentionError(f"{name}={value!r} is unknown{did_you_mean(value, known)}; one of {known}")
        for name, number in (("needles", self.needles), ("digits", self.digits)):
            if number < 1:
                raise SparseAttentionError(f"{name}={number} must be at least 1; nearest: 1")
        if self.kind != "single" and 2 * self.needles > 10**self.digits // 2:
            raise SparseAttentionError(
                f"digits={self.digits} gives too few numbers for needles={self.needles}; nearest: digits=3"
            )

    def samples(
        self, haystack: Haystack, length: int, count: int, seed: int = 0, depth: float | None = None
    ) -> list[Sample]:
        """``count`` rows of exactly ``length`` tokens; the same for the same seed.

        Args:
            depth: where the needle asked for stands, from 0, the text's beginning, to 1 (None: drawn evenly, anew for
                each row); of "single" and "multi_key". All other needles stand anywhere.

        Raises:
            SparseAttentionError: the needles and the question leave no room for a text, or ``depth`` does not fit.
        """
        if depth is not None and (self.kind not in ("single", "multi_key") or not 0 <= depth <= 1):
            raise SparseAttentionError(
                f"depth={depth} must lie in [0, 1], and is for 'single' and 'multi_key', not {self.kind!r}; nearest: "
                "None"
            )
        rng = random.Random(f"retrieval {self.kind} {seed} {length} {depth}")
        return [self._sample(haystack, length, rng, depth) for _ in range(count)]

    def _sample(self, haystack: Haystack, length: int, rng: random.Random, depth: float | None) -> Sample:
        needles, question, answers = self._texts(rng)

        def tokens(text: str) -> list[int]:
            found: list[int] = haystack.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return found

        start = start_token(haystack.tokenizer)
        head = [*([] if start is None else [start]), *(tokens(self._words.before) if self._words.before else [])]
        hidden, asked, written = [tokens(n) for n in needles], tokens(question), [tokens(f" {a}") for a, _ in answers]
        room = length - sum(map(len, [head, asked, *hidden, *written]))
        if room < 1:
            raise SparseAttentionError(
                f"length={length} leaves no room beside needles and question of {length - room} tokens; nearest: "
                f"{length - room + 1}, or wording='short'"
            )
        lines = haystack.lines(rng, room)
        places = sorted(rng.random() for _ in hidden)
        if self.kind != "variables":
            rng.shuffle(places)  # a chain's order is that of its text, any other needle's is free
        if depth is not None:
            places[answers[0][1]] = depth
        ids, order, before = _inserted(lines, hidden, places, room)
        ids = [*head, *ids, *asked]
        found = []
        # Answers in the order of the text: the only one that a model can know.
        for (_, needle), piece in sorted(zip(answers, written, strict=True), key=lambda a: order.index(a[0][1])):
            found.append(Answer(len(ids), len(ids) + len(piece), before[needle] / room))
            ids += piece
        return Sample(ids, tuple(found))

    @property
    def _words(self) -> Wording:
        if self.wording == "short":
            return _SHORT_VARIABLES if self.kind == "variables" else _SHORT
        return {"single": _SINGLE, "multi_key": _SINGLE, "multi_value": _SEVERAL, "variables": _VARIABLES}[self.kind]

    def _texts(self, rng: random.Random) -> tuple[list[str], str, list[tuple[str, int]]]:
        """The needles, the question, and its answers, each with the number of its needle."""
        words, count = self._words, 1 if self.kind == "single" else self.needles
        numbers = _distinct(lambda: str(rng.randrange(10 ** (self.digits - 1), 10**self.digits)), max(2, count))
        if self.kind == "variables":
            names = _distinct(lambda: _name(rng).upper(), 2 * count)
            chains = [
                [
                    words.needle.format(key=chain[0], value=number),
                    *(words.link.format(key=b, other=a) for a, b in itertools.pairwise(chain)),
                ]
                for chain, number in ((names[:count], numbers[0]), (names[count:], numbers[1]))
            ]
            # Two chains in one text: each in its order, which comes next is drawn.
            first = set(rng.sample(range(2 * count), count))
            own, other = iter(range(count)), iter(range(count))
            needles, answers = [], []
            for at in range(2 * count):
                link = next(own if at in first else other)
                needles.append(chains[0 if at in first else 1][link])
                if at in first:
                    answers.append((names[link], at))
            return needles, words.question.format(value=numbers[0], count=count), answers
        if self.kind == "multi_value":
            key = _name(rng)
            needles = [words.needle.format(key=key, value=number) for number in numbers[:count]]
            return needles, words.question.format(key=key), [(numbers[at], at) for at in range(count)]
        keys = _distinct(lambda: _name(rng), count)
        needles = [words.needle.format(key=k, value=n) for k, n in zip(keys, numbers[:count], strict=True)]
        return needles, words.question.format(key=keys[0]), [(numbers[0], 0)]


def _inserted(
    lines: list[list[int]], needles: list[list[int]], places: list[float], room: int
) -> tuple[list[int], list[int], list[int]]:
    """Lines with each needle before the line nearest to its place; the needles in their order there; and how many
    tokens of haystack stand before each needle."""
    ends = [0, *itertools.accumulate(len(line) for line in lines)]
    order = sorted(range(len(needles)), key=lambda needle: places[needle])
    nearest = [min(range(len(ends)), key=lambda e: abs(ends[e] - place * room)) for place in places]
    ids: list[int] = []
    for number, line in enumerate([*lines, []]):
        for needle in order:
            if nearest[needle] == number:
                ids += needles[needle]
        ids += line
    return ids, order, [ends[number] for number in nearest]


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


@torch.no_grad()
def found_answers(model: Any, samples: Sequence[Sample], batch_size: int = 1) -> Iterator[tuple[bool, ...]]:
    """For each sample, whether each of its answers is what greedy decoding writes, given the row up to it.

    Args:
        model: a causal language model, in evaluation mode; it sees rows of one length together, on its own device.
        samples: of one length.
    """
    device = next(model.parameters()).device
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    for begin in range(0, len(samples), batch_size):
        batch = samples[begin : begin + batch_size]
        ids = torch.tensor([sample.input_ids for sample in batch], device=device)
        first = min(sample.answers[0].begin for sample in batch) - 1
        logits = model(
            input_ids=ids, use_cache=False, **({"logits_to_keep": ids.shape[1] - first} if keeps else {})
        ).logits
        written = logits[:, -(ids.shape[1] - first) :].argmax(-1)
        right = (written[:, :-1] == ids[:, first + 1 :]).tolist()
        for sample, row in zip(batch, right, strict=True):
            yield tuple(all(row[a.begin - first - 1 : a.end - first - 1]) for a in sample.answers)
