#!/usr/bin/env bash
# transformers 5.24.0: model.add_adapter asks for a PEFT that the registry did not have on 2026-11-29 (0.21.2 was the newest),
# and load_adapter, which makes the same layers, does not ask.
# Seen: add_adapter raises and names 0.22.0; load_adapter of the same configuration runs.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging
import tempfile

import peft
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

logging.disable(logging.WARNING)
config = BertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
lora = LoraConfig(r=2, target_modules=["query"])
try:
    BertModel(config).add_adapter(lora)
    said = ""
except (ImportError, ValueError, RuntimeError) as error:
    said = str(error)
with tempfile.TemporaryDirectory() as folder:
    get_peft_model(BertModel(config), lora).save_pretrained(folder)
    model = BertModel(config)
    model.load_adapter(folder)
layers = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
print(f"peft {peft.__version__}: add_adapter says {said[:120]!r}; load_adapter made {len(layers)} LoRA layer(s)")
assert "0.22.0" in said and layers, "the behaviour has changed"
PY
