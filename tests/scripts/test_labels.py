"""Classes are numbered as the model numbers them, in evaluation and in training that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import FEW_STEPS
from transformers import BertConfig, BertForSequenceClassification, ByT5Tokenizer

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import load_source
from sa_hf.tools import evaluate, finetune

CLASSES = "sequence-classification"
NAMES = ("zebra", "ant", "mole")  # of which the alphabet makes another order
BYTES = {"zebra": "z", "ant": "a", "mole": "m"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def perfect_model(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """A classifier that reads a text's first byte: z, a, m are its classes 0, 1, 2."""
    tokenizer = ByT5Tokenizer(mask_token="<extra_id_0>", model_max_length=8)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=3, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=8, pad_token_id=0,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embeddings = model.bert.embeddings
        for i, letter in enumerate(BYTES.values()):
            embeddings.word_embeddings.weight[tokenizer(letter).input_ids[0], i] = 1.0
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight.fill_(1.0)
        model.bert.pooler.dense.weight.copy_(torch.eye(3))
        model.classifier.weight.copy_(torch.eye(3))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, labels: list[Any], names: list[str] | None = None) -> str:
    rows = [
        {"text": f"{BYTES[n]}{i}", "label": v} for i, (v, n) in enumerate(zip(labels, names or labels, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def accuracy(model: Path, data: str) -> float:
    flags = ["--task", CLASSES, "--max_length", "8", "--dataset", data]
    return evaluate.main(["--model", str(model), *flags])["accuracy"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["mole", "ant", "zebra"], None),
        (["ant", "mole"], None),
        (["mole", "mole"], None),
        ([" ant", "mole "], ["ant", "mole"]),
        ([1, 0, 2], ["ant", "zebra", "mole"]),
        (["1", "2"], ["ant", "mole"]),
        ([1.0, 2.0], ["ant", "mole"]),
    ],
)
def test_a_perfect_model_is_right_on_any_subset_and_order(
    labels: list[Any], names: list[str] | None, tmp_path: Path
) -> None:
    model = perfect_model(tmp_path / "model")
    assert accuracy(model, write(tmp_path / "test.jsonl", labels, names)) == 1.0


def test_class_labels_go_by_their_names(tmp_path: Path) -> None:
    import datasets

    model = perfect_model(tmp_path / "model")
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ant", "mole", "zebra"])}
    rows = {"text": ["a1", "z1", "m1", "m2"], "label": [0, 2, 1, 1]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(tmp_path / "test.parquet")
    assert accuracy(model, str(tmp_path / "test.parquet")) == 1.0


def test_integers_of_a_model_that_was_trained_on_integers_are_its_names(tmp_path: Path) -> None:
    model = perfect_model(tmp_path / "model", ("9", "5", "7"))
    path = write(tmp_path / "test.jsonl", [5, 7, 9], ["ant", "mole", "zebra"])
    assert accuracy(model, path) == 1.0
    with pytest.raises(SparseAttentionError, match=r"label '0' is no class of the model.*'9', '5', '7'"):
        accuracy(model, write(tmp_path / "test.jsonl", [0], ["zebra"]))


def test_an_unknown_label_is_named_with_those_known(tmp_path: Path) -> None:
    model = perfect_model(tmp_path / "model")
    path = write(tmp_path / "test.jsonl", ["ant", "mloe"], ["ant", "mole"])
    message = "test.jsonl, row 2.*label 'mloe' is no class.*did you mean 'mole'.*'zebra', 'ant', 'mole'"
    with pytest.raises(SparseAttentionError, match=message):
        accuracy(model, path)
    with pytest.raises(SparseAttentionError, match="label '3' is no class"):
        accuracy(model, write(tmp_path / "test.jsonl", [3], ["ant"]))


def test_rows_without_a_class_of_a_hub_data_set_are_named(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"text": ["one"], "label": [-1]}, features).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(SparseAttentionError, match="row 1: column 'label' is -1, which names no class"):
        load_source(
            CLASSES, str(tmp_path / "test.parquet"), max_length=8, evaluate_only=True, label2id={"a": 0, "b": 1}
        )


def test_embedded_topics_go_by_the_models_numbers() -> None:
    from sa_hf.tasks.topic import TOPICS

    reverse = {name: len(TOPICS) - 1 - i for i, name in enumerate(TOPICS)}
    plain = load_source(CLASSES, "stdlib-short", max_length=8, evaluation_rows=6)
    renumbered = load_source(CLASSES, "stdlib-short", max_length=8, evaluation_rows=6, label2id=reverse)
    wanted = [reverse[TOPICS[row["label"]]] for row in plain.evaluation]
    assert [row["label"] for row in renumbered.evaluation] == wanted


def test_a_regression_is_not_evaluated_as_a_classifier(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(SparseAttentionError, match="1 class, so it is no classifier"):
        accuracy(tmp_path, "stdlib-short")


def tuned(model: Path, output: Path, data: str) -> dict[str, int]:
    flags = ["--model", str(model), "--pattern", "none", "--task", CLASSES, "--max_length", "8", "--dataset", data]
    finetune.main([*FEW_STEPS, *flags, "--output_dir", str(output), "--verify", "same"])
    return json.loads((output / "config.json").read_text())["label2id"]


def test_training_goes_on_with_a_classifiers_own_numbers(tmp_path: Path) -> None:
    model = perfect_model(tmp_path / "model")
    path = write(tmp_path / "rows.jsonl", ["ant", "mole"] * 6)
    assert tuned(model, tmp_path / "out", path) == {"zebra": 0, "ant": 1, "mole": 2}


def test_other_classes_than_a_classifiers_get_a_new_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = perfect_model(tmp_path / "model")
    path = write(tmp_path / "rows.jsonl", ["cat", "dog"] * 6, ["ant", "mole"] * 6)
    assert tuned(model, tmp_path / "out", path) == {"cat": 0, "dog": 1}
    assert "its classes ['zebra', 'ant', 'mole'] are not the data's, ['cat', 'dog']" in capsys.readouterr().err
