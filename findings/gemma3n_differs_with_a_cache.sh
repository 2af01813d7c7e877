#!/usr/bin/env bash
# transformers 5.5.0: Gemma 3n computes other logits with a cache than without one. Its last layers read the keys of an earlier
# layer where there is a cache, and make keys of their own where there is none. (5.24.0 agrees with itself.)
# Seen: a random model of 4 layers, 2 of them sharing: logits differ by more than a tenth of their size.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.5.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging

import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

logging.disable(logging.WARNING)
torch.manual_seed(0)
config = Gemma3nTextConfig(
    vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8, intermediate_size=64,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=64, laurel_rank=4, altup_num_inputs=2,
    activation_sparsity_pattern=[0.0] * 4,
)
model = Gemma3nForCausalLM(config).eval()
tokens = torch.randint(0, 64, (1, 12))
with torch.no_grad():
    without, cached = model(tokens, use_cache=False).logits, model(tokens, use_cache=True).logits
off, size = float((without - cached).abs().max()), float(without.abs().max())
print(f"logits up to {size:.3g}, with a cache {off:.3g} off")
assert off > size / 10, "the behaviour has changed"
PY
