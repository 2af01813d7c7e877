"""Retrieval: rows are as long as asked, their answers follow from their text, and scoring is greedy decoding."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from sa_hf import SparseAttentionError
from sa_hf.tasks.retrieval import Haystack, RetrievalTask, found_answers, haystack_texts

TOKENIZER = ByT5Tokenizer()
TEXT = "".join(f"line {i} of the text\n" for i in range(400))


def texts_of(
    task: RetrievalTask, count: int = 12, length: int = 900, **options: Any
) -> list[tuple[Any, str, list[str]]]:
    found = []
    for sample in task.samples(Haystack(TOKENIZER, [TEXT]), length, count, **options):
        assert len(sample.input_ids) == length
        answers = [TOKENIZER.decode(sample.input_ids[a.begin : a.end]).strip() for a in sample.answers]
        found.append((sample, TOKENIZER.decode(sample.input_ids), answers))
    return found


@pytest.mark.parametrize("wording", ["ruler", "short"])
def test_the_key_asked_for_has_the_number_answered(wording: str) -> None:
    for kind, needles in (("single", 1), ("multi_key", 3)):
        task = RetrievalTask(kind=kind, needles=3, wording=wording)
        for _, text, answers in texts_of(task):
            keys = dict(re.findall(r"(?:for|of) (\w+) is:? (\d{7})\.\n", text))
            asked = re.findall(r"(?:for|of) (\w+) (?:mentioned in the provided text )?is \d+$", text)
            assert len(keys) == needles
            assert answers == [keys[asked[-1]]]
            assert text.endswith(f" is {answers[0]}")


@pytest.mark.parametrize("wording", ["ruler", "short"])
def test_all_numbers_of_one_key_in_the_order_of_the_text(wording: str) -> None:
    for _, text, answers in texts_of(RetrievalTask(kind="multi_value", needles=4, wording=wording)):
        assert re.findall(r"(\d{7})\.\n", text) == answers
        assert len(set(re.findall(r"(\w+) is:? \d{7}\.\n", text))) == 1


@pytest.mark.parametrize("wording", ["ruler", "short"])
def test_variables_are_those_of_the_chain(wording: str) -> None:
    for _, text, answers in texts_of(RetrievalTask(kind="variables", needles=3, wording=wording)):
        values: dict[str, str] = {}
        for name, right in re.findall(r"VAR ([A-Z]+) = (.+)\n", text):
            values[name] = values[right.removeprefix("VAR ")] if right.startswith("VAR ") else right
        asked = re.findall(r"(?:value|of) (\d+)", text)[-1]
        assert answers == [name for name, value in values.items() if value == asked]
        assert (len(answers), len(values)) == (3, 6)


def test_the_rest_is_the_haystack() -> None:
    for _, text, _ in texts_of(RetrievalTask(kind="single", wording="short")):
        body = text[: text.rindex("The code")]
        rest = re.sub(r"The code of \w+ is \d+\.\n", "", body)
        numbers = [int(n) for n in re.findall(r"line (\d+) of the text\n", rest)]
        steps = [b - a for a, b in pairwise(numbers)]
        # One piece of the text, or its end and another piece.
        assert sum(step != 1 for step in steps) <= 2
        assert len(rest) - sum(len(f"line {n} of the text\n") for n in numbers) < 25


def test_texts_of_ones_own_are_the_haystack_and_their_last_tenth_is_held_out(tmp_path: Path) -> None:
    for name, letter in (("one.txt", "a"), ("two.md", "b")):
        (tmp_path / name).write_text("".join(f"{letter} {i}\n" for i in range(20)))
    (tmp_path / "rows.csv").write_text("no,text\n")
    train, held_out = (haystack_texts(str(tmp_path), split) for split in ("train", "evaluation"))
    assert held_out == ["a 18\na 19\n", "b 18\nb 19\n"]
    assert train is not None
    assert [text + rest for text, rest in zip(train, held_out, strict=True)] == haystack_texts(str(tmp_path))
    assert haystack_texts(str(tmp_path / "one.txt")) == [train[0] + held_out[0]]
    hay = Haystack(TOKENIZER, haystack_texts(str(tmp_path)))
    (sample,) = RetrievalTask(wording="short").samples(hay, 200, 1)
    rest = re.sub(r"The code of \w+ is \d+\.\n", "", TOKENIZER.decode(sample.input_ids, skip_special_tokens=True))
    assert set(re.findall("[ab] 1[0-9]", rest))


def test_a_haystack_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "line.txt").write_text("one line\n")
    for path, split, message in (
        ("gone", None, "gone' must be 'stdlib', 'noise'"), ("latin.txt", None, "latin.txt is not in UTF-8"),
        ("short", "evaluation", "no text for evaluation"),
    ):  # fmt: skip
        with pytest.raises(SparseAttentionError, match=message):
            haystack_texts(str(tmp_path / path), split)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_stands_where_it_is_asked_to(depth: float) -> None:
    for kind in ("single", "multi_key"):
        for sample, text, answers in texts_of(RetrievalTask(kind=kind, wording="short"), depth=depth):
            assert sample.answers[0].depth == pytest.approx(depth, abs=0.02)
            needle = text.index(f"is {answers[0]}.")
            others = 0 if kind == "single" else 3 * 33
            assert needle / text.rindex("The code") == pytest.approx(depth, abs=0.06 + others / 900)


def test_depths_are_spread_where_none_is_asked_for() -> None:
    depths = [a.depth for sample, _, _ in texts_of(RetrievalTask(kind="multi_value"), 60, 1500) for a in sample.answers]
    assert len({int(4 * d) for d in depths} & {0, 1, 2, 3}) == 4
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.08)


def test_rows_repeat_for_a_seed_and_only_answers_are_predicted() -> None:
    task, haystack = RetrievalTask(kind="multi_value", needles=2, wording="short"), Haystack(TOKENIZER)
    one, again, other = (task.samples(haystack, 300, 3, seed=seed) for seed in (5, 5, 6))
    assert one == again != other
    for sample in one:
        row = sample.row()
        kept = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert kept == list(range(sample.answers[0].begin, 300))
        assert [row["input_ids"][i] for i in kept] == [row["labels"][i] for i in kept]


def test_scoring_is_greedy_decoding() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    samples = RetrievalTask(kind="multi_value", needles=2, digits=1, wording="short").samples(
        Haystack(TOKENIZER), 200, 8, seed=1
    )
    planted = []
    for number, sample in enumerate(samples):
        ids, (first, second) = list(sample.input_ids), sample.answers
        # Both answers are what the model writes, but for one token of them in all rows but the first.
        places = [*range(first.begin, first.end), *range(second.begin, second.end)]
        for place in places:
            ids[place] = int(model(torch.tensor([ids[:place]])).logits[0, -1].argmax())
            if number and place == places[number % len(places)]:
                ids[place] = (ids[place] + 1) % 384
        planted.append(type(sample)(ids, sample.answers))
    expected = []
    for sample in planted:
        right = []
        for answer in sample.answers:
            context = torch.tensor([sample.input_ids[: answer.begin]])
            new = answer.end - answer.begin
            written = model.generate(context, max_new_tokens=new, do_sample=False)[0, answer.begin :].tolist()
            right.append(written == sample.input_ids[answer.begin : answer.end])
        expected.append(tuple(right))
    assert set(expected) == {(True, True), (False, True), (True, False)}
    for batch in (1, 3):
        assert list(found_answers(model, planted, batch)) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetrievalTask(kind="singel"), "did you mean 'single'"),
        (lambda: RetrievalTask(kind="multi_key", needles=0), "needles=0.*nearest: 1"),
        (lambda: RetrievalTask(kind="multi_key", digits=1, needles=9), "digits=1"),
        (lambda: RetrievalTask().samples(Haystack(TOKENIZER), 100, 1), r"length=100.*nearest: \d+"),
        (lambda: RetrievalTask().samples(Haystack(TOKENIZER), 900, 1, depth=1.5), "depth=1.5"),
        (lambda: RetrievalTask(kind="variables").samples(Haystack(TOKENIZER), 900, 1, depth=0.5), "nearest: None"),
        (lambda: Haystack(TOKENIZER, [" ", "x" * 900]), "no line"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_said(make: Any, message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        make()


def test_a_start_token_comes_first() -> None:
    def encode(text: Any, **options: Any) -> Any:
        return {"input_ids": [list(map(ord, t)) for t in text] if isinstance(text, list) else list(map(ord, text))}

    class Characters(SimpleNamespace):
        def __call__(self, text: Any, **options: Any) -> Any:
            return encode(text)

    tokenizer = Characters(bos_token_id=1, eos_token_id=2, cls_token_id=None, sep_token_id=None)
    (sample,) = RetrievalTask(wording="short").samples(Haystack(tokenizer), 120, 1)
    assert sample.input_ids[0] == 1
    assert 1 not in sample.input_ids[1:]
