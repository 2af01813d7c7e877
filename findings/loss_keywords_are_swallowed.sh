#!/usr/bin/env bash
# transformers 5.24.0: model(..., labels=labels, label_smoothing=0.1) and weight=... are taken, handed to the loss function and
# dropped there: the loss is the same number as without them. (ignore_index, handed the same way, counts.)
# Seen: equal losses with label_smoothing=0.5 and with class weights; another one with ignore_index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
model = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 8, (1, 32))
with torch.no_grad():
    plain = float(model(tokens, labels=tokens).loss)
    smooth = float(model(tokens, labels=tokens, label_smoothing=0.5).loss)
    weighed = float(model(tokens, labels=tokens, weight=torch.arange(64.0)).loss)
    ignored = float(model(tokens, labels=tokens, ignore_index=int(tokens[0, 1])).loss)
print(f"loss {plain:.5f}, label_smoothing {smooth:.5f}, weight {weighed:.5f}, ignore_index {ignored:.5f}")
assert plain == smooth == weighed != ignored, "the behaviour has changed"
PY
