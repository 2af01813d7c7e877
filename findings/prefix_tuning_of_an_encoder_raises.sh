#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: prefix tuning of BERT raises that the model does not support past key values. PEFT looks
# for a parameter of that name, which transformers 5.24 calls cache; with transformers 5.23.0 the same call runs.
# Seen: ValueError: Model does not support past key values which are required for prefix tuning.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

logging.disable(logging.WARNING)
config = BertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
model = get_peft_model(
    BertForSequenceClassification(config), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
)
try:
    model(input_ids=torch.randint(0, 60, (1, 8)))
    said = ""
except ValueError as error:
    said = str(error)
print(f"said: {said!r}")
assert "past key values" in said, "the behaviour has changed"
PY
