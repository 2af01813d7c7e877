#!/usr/bin/env bash
# transformers 5.24.0: one short batch switches a BigBird model to full attention for its whole life. A later long input
# gives other hidden states than the same input gave before.
# Seen: attention_type is original_full after a batch of 32 tokens, and 512 tokens then give states that differ by 0.0071.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging

import torch
from transformers import BigBirdConfig, BigBirdModel

logging.disable(logging.WARNING)
torch.manual_seed(0)
config = BigBirdConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=1024, block_size=16, num_random_blocks=3, attention_type="block_sparse",
)
model = BigBirdModel(config).eval()
long, short = torch.randint(0, 64, (1, 512)), torch.randint(0, 64, (1, 32))
with torch.no_grad():
    before, again = model(long).last_hidden_state, model(long).last_hidden_state
    assert torch.equal(before, again), "the same call twice differs by itself"
    model(short)
    after = model(long).last_hidden_state
off = float((before - after).abs().max())
print(f"attention_type is {model.attention_type} after a short batch; the long input moved by {off:.2g}")
assert model.attention_type == "original_full" and off > 1e-4, "the behaviour has changed"
PY
