#!/usr/bin/env bash
# peft 0.21.2: PeftModel.from_pretrained ignores the tensors of an adapter file that the base has no place for. An adapter that
# trained a module which the new base lacks loads without an error or a warning, and does something else.
# Seen: a file with an extra module loads, its tensor is nowhere, no warning names it.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

logging.disable(logging.WARNING)
config = BertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
trained = BertModel(config)
trained.gate = torch.nn.Linear(4, 4)
lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["gate"])
with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    get_peft_model(trained, lora).save_pretrained(folder)
    held = [name for name in load_file(Path(folder) / "adapter_model.safetensors") if "gate" in name]
    loaded = PeftModel.from_pretrained(BertModel(config), folder)
placed = [name for name, _ in loaded.named_parameters() if "gate" in name]
said = [str(w.message) for w in caught if "gate" in str(w.message)]
print(f"in the file: {held}; in the model: {placed}; warnings that name it: {len(said)}")
assert held and not placed and not said, "the behaviour has changed"
PY
