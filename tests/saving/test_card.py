"""The model card that goes with a saved model: what is known, nothing else, in the hub's form."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from sa_hf import patch_model
from sa_hf.tools.card import write_card


def saved(folder: Path, origin: str = "") -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128,
    )  # fmt: skip
    model = patch_model(BertForMaskedLM(config), {"0": "star", "1": "bigbird"})
    model.config._name_or_path = origin
    model.save_pretrained(folder)
    return model


def checked(folder: Path) -> ModelCardData:
    """The card's metadata, parsed strictly and whole after another round through YAML, as a push makes it."""
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    again = ModelCard(str(card), ignore_metadata_errors=False)
    assert again.data.to_dict() == card.data.to_dict()
    return card.data


def test_a_save_writes_a_card_with_what_is_known_alone(tmp_path: Path) -> None:
    saved(tmp_path, "org/some-bert")
    data, text = checked(tmp_path), (tmp_path / "README.md").read_text()
    assert data.base_model == "org/some-bert"
    assert {"sparse-attention", "star", "bigbird"} == set(data.tags)
    assert (data.license, data.datasets, data.eval_results) == (None, None, None)
    assert "longest input, tokens: 128" in text
    assert "dtype of the weights: float32" in text
    assert "licence" not in text
    assert "AutoModelForMaskedLM.from_pretrained" in text
    saved(tmp_path / "scratch")
    assert checked(tmp_path / "scratch").base_model is None


def test_a_card_of_the_users_own_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path, "org/some-bert")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_metrics_and_licence_join_and_stay_over_a_load_and_a_save(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    saved(first)
    arguments = {"task": "masked-lm", "dataset": "texts.jsonl", "model": "minilm"}
    metrics = {"arguments": arguments, "eval_loss": 1.25, "eval_runtime": 9.0}
    (first / "metrics.json").write_text(json.dumps(metrics))
    write_card(first)
    told = (first / "README.md").read_text()
    assert {"- base model: minilm", "- data: texts.jsonl", "- loss on texts.jsonl: 1.25"} <= set(told.splitlines())
    assert checked(first).base_model is None  # no name of the hub
    write_card(first, base_model="org/some-bert", license="apache-2.0", dataset="stdlib")
    data = checked(first)
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "org/some-bert", ["stdlib"])
    (result,) = data.eval_results or ()
    assert (result.task_type, result.metric_type, result.metric_value) == ("fill-mask", "loss", 1.25)
    AutoModelForMaskedLM.from_pretrained(first, trust_remote_code=True).save_pretrained(again)
    kept = checked(again)
    assert (kept.license, kept.base_model) == ("apache-2.0", "org/some-bert")
    assert not kept.eval_results  # measured of the weights in the other folder
