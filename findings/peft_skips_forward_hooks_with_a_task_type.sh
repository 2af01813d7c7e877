#!/usr/bin/env bash
# peft 0.20.0 with transformers 5.24.0: a PeftModel with a task_type calls forward() of the model that it wraps, so forward
# hooks on that model never run; without a task_type they do. (peft 0.21.2 runs them in both cases.)
# Seen: 1 call without a task_type, 0 calls with SEQ_CLS.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.20.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

logging.disable(logging.WARNING)
config = BertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
seen = {}
for task in (None, "SEQ_CLS"):
    model, calls = BertForSequenceClassification(config), []
    model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type=task))
    adapted(input_ids=torch.randint(0, 60, (1, 8)))
    seen[task] = len(calls)
    print(f"task_type={task}: the hook ran {len(calls)} times")
assert seen == {None: 1, "SEQ_CLS": 0}, "the behaviour has changed"
PY
