#!/usr/bin/env bash
# transformers 5.24.0: in evaluation every random block of BigBird is block 0, which the global part holds already: a model
# trained with three random blocks is evaluated with none, and block 0 counts several times in its softmax.
# Seen: in training the draws spread over blocks 1 to 9 and more, in evaluation they are block 0 alone.
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
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

logging.disable(logging.WARNING)
torch.manual_seed(0)
config = BigBirdConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=1024, block_size=16, num_random_blocks=3, attention_type="block_sparse",
)
model = BigBirdModel(config)
drawn = []
for name in ("_bigbird_block_rand_mask", "_bigbird_block_rand_mask_with_head"):
    def recorded(self, *args, plan=getattr(BigBirdBlockSparseAttention, name), **kwargs):
        blocks = plan(self, *args, **kwargs)
        for block in blocks if isinstance(blocks, list) else [blocks]:
            drawn.extend(int(b) for b in block.ravel())
        return blocks

    setattr(BigBirdBlockSparseAttention, name, recorded)
tokens, seen = torch.randint(0, 64, (1, 512)), {}
for mode in ("train", "eval"):
    drawn.clear()
    with torch.no_grad():
        getattr(model, mode)()(tokens)
    seen[mode] = sorted(set(drawn))
    print(f"{mode}: random blocks drawn from {seen[mode]}")
assert seen["eval"] == [0] and len(seen["train"]) > 3 and 0 not in seen["train"], "the behaviour has changed"
PY
