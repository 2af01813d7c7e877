#!/usr/bin/env bash
# peft 0.21.2: merge_and_unload() of LNTuning leaves what modules_to_save trains (a classifier) in PEFT's wrapper. The
# merged model is right in memory; saved and loaded by transformers its head is a new one of random weights.
# Seen: classifier is a ModulesToSaveWrapper after the merge, logits 0.071 off once reloaded; with LoRA 0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

ids, labels = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def off_after_reload(config):
    torch.manual_seed(0)
    model = get_peft_model(BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = model.eval().merge_and_unload()
    with torch.no_grad():
        expected = merged(ids).logits
        merged.save_pretrained("merged")
        loaded = BertForSequenceClassification.from_pretrained("merged").eval()
        return type(merged.classifier).__name__, float((loaded(ids).logits - expected).abs().max())


by_norms = off_after_reload(LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]))
by_lora = off_after_reload(LoraConfig(task_type="SEQ_CLS"))
print(f"LNTuning: classifier {by_norms[0]}, {by_norms[1]:.2g} off after saving and loading; LoRA: {by_lora[0]}, {by_lora[1]:.2g}")
assert by_norms[1] > 0.01 and by_lora[1] < 1e-5, "the behaviour has changed"
PY
