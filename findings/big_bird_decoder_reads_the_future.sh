#!/usr/bin/env bash
# transformers 5.24.0: BigBirdForCausalLM with is_decoder=True and block-sparse attention is not causal: changing the last
# token changes the logits of earlier positions. Nothing warns of it.
# Seen: 511 of 511 earlier positions change.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging

import torch
from transformers import BigBirdConfig, BigBirdForCausalLM

logging.disable(logging.WARNING)
torch.manual_seed(0)
config = BigBirdConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=1024, block_size=16, num_random_blocks=3, attention_type="block_sparse",
)
config.is_decoder = True
model = BigBirdForCausalLM(config).eval()
tokens = torch.randint(0, 64, (1, 512))
other = tokens.clone()
other[0, -1] = (other[0, -1] + 1) % 64
with torch.no_grad():
    moved = (model(tokens).logits - model(other).logits)[0, :-1].abs().amax(-1)
count = int((moved > 0).sum())
print(f"{count} of {len(moved)} earlier positions changed with the last token (attention: {config.attention_type})")
assert count > 400, "the behaviour has changed"
PY
