#!/usr/bin/env bash
# transformers 5.24.0: packed rows whose position_ids restart are kept apart with use_cache=False alone. With the
# default, a decoder in evaluation lets the second document read the first, without a warning.
# Seen: the second document's logits are 0.25 off by default and 6e-8 off with use_cache=False.
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
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
model = LlamaForCausalLM(config).eval()
first, second = torch.randint(0, 64, (1, 9)), torch.randint(0, 64, (1, 7))
packed = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
with torch.no_grad():
    alone = model(second).logits
    default = model(packed, position_ids=positions).logits[:, 9:]
    no_cache = model(packed, position_ids=positions, use_cache=False).logits[:, 9:]
off_default, off_no_cache = float((default - alone).abs().max()), float((no_cache - alone).abs().max())
print(f"second document against itself alone: default {off_default:.2g} off, use_cache=False {off_no_cache:.2g} off")
assert off_default > 0.01 and off_no_cache < 1e-5, "the behaviour has changed"
PY
