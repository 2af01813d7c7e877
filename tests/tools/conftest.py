"""A sparse checkpoint for the command line; the script that writes the cards, for the tests of what it wrote."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_modules import script_module
from transformers import BertConfig, BertForMaskedLM

from sa_hf import patch_model


@pytest.fixture(scope="session")
def cards() -> ModuleType:
    return script_module("cards")


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
