#!/usr/bin/env bash
# transformers 5.24.0: PaliGemma given text alone, without token_type_ids and without an attention mask, is a causal model
# under attn_implementation="eager" and a bidirectional one under "sdpa". Nothing warns of it.
# Seen: 0 of 23 earlier positions change with the last token by eager, 23 of 23 by sdpa; logits are 7.76 apart.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

logging.disable(logging.WARNING)
torch.manual_seed(0)
text = {
    "model_type": "gemma", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8,
}
vision = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4, "projection_dim": 32,
}
config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=63, projection_dim=32, hidden_size=32)
model = PaliGemmaForConditionalGeneration(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
tokens = torch.randint(3, 60, (1, 24))
other = tokens.clone()
other[0, -1] = (other[0, -1] + 1) % 60


def logits(ids, attention):
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(input_ids=ids).logits[0, :-1]


moved = {}
for attention in ("eager", "sdpa"):
    changed = (logits(tokens, attention) - logits(other, attention)).abs().amax(-1)
    moved[attention] = int((changed > 1e-4).sum())
    print(f"{attention}: {moved[attention]} of {len(changed)} earlier positions change with the last token")
apart = float((logits(tokens, "eager") - logits(tokens, "sdpa")).abs().max())
print(f"logits of the two apart: {apart:.2f}")
assert moved["eager"] == 0, "the behaviour has changed"
assert moved["sdpa"] > 20, "the behaviour has changed"
assert apart > 1, "the behaviour has changed"
PY
