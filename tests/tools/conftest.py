"""A sparse checkpoint for the command line; the script that writes the cards, for the tests of what it wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from sa_hf import patch_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "cards.py"


@pytest.fixture(scope="session")
def cards() -> ModuleType:
    """``scripts/cards.py`` as a module."""
    spec = importlib.util.spec_from_file_location("cards", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128,
    )  # fmt: skip
    model = patch_model(BertForMaskedLM(config), {"0": "dense", "1-": "bigbird"})
    folder = tmp_path_factory.mktemp("sparse")
    model.save_pretrained(folder)
    return folder
