"""What the README tells a reader to type: its Python runs, its commands and flags are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from older_releases import REFUSED_THERE, older_releases_may

from sa_hf.tools import commands, evaluate, finetune

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SIZES: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 16, "vocab_size": 32}


@pytest.mark.parametrize("position", range(1, len(PYTHON)))
def test_every_block_of_python_runs(position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stands in test_wheel.py."""
    monkeypatch.chdir(tmp_path)
    config = tf.BertConfig(num_hidden_layers=12, max_position_embeddings=4096, **SIZES)
    names: dict[str, Any] = {"model": tf.BertForSequenceClassification(config)}
    if "AutoModelForCausalLM" in PYTHON[position]:
        names |= {
            "AutoModelForCausalLM": tf.AutoModelForCausalLM,
            "model": tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
        }
    t5 = tf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    names["t5"] = tf.T5ForConditionalGeneration(t5)
    with older_releases_may(REFUSED_THERE):  # T5
        exec(PYTHON[position], names)


def test_the_commands_are_there() -> None:
    (table,) = re.findall(r"\| `sa-hf` \| shows \|\n(.*?)\n\n", README, re.DOTALL)
    told = {name for row in table.splitlines() for name in re.findall(r"`(\w+)[^`]*`", row.split("|")[1])}
    there = {str(c.name or getattr(c.callback, "__name__", "")) for c in commands.app.registered_commands}
    assert told == there


def test_scripts_and_files_that_are_named_are_there() -> None:
    named = {*re.findall(r"(?:scripts|\.ci|model_cards)/[\w./-]+\.\w+", README)}
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_flags_that_are_typed_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    typed = re.findall(r"^(?:python|accelerate launch .*?) scripts/(finetune|evaluate)\.py (.*)$", README, re.MULTILINE)
    assert {script for script, _ in typed} == {"finetune", "evaluate"}
    for script, words in typed:
        if script == "finetune":
            finetune.chosen_pattern(finetune.parse_arguments(shlex.split(words)))
        else:
            evaluate.build_parser().parse_args(shlex.split(words))
