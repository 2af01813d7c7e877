#!/usr/bin/env bash
# transformers 5.24.0: ModernBERT hands an attention function sliding_window = local_attention / 2 + 1, and its mask keeps
# local_attention / 2 positions on each side, own one beside: an odd count of local_attention + 1 keys. A function that
# reads the keyword as other models mean it (w keys, own one the last) keeps another set.
# Seen: local_attention=8: sliding_window=5 and 9 keys.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import ModernBertConfig, ModernBertModel
from transformers.models.modernbert import modeling_modernbert

seen, eager = [], modeling_modernbert.eager_attention_forward


def recorded(module, query, key, value, attention_mask, **kwargs):
    if attention_mask is not None and kwargs.get("sliding_window") is not None:
        seen.append((kwargs["sliding_window"], (attention_mask[0, 0, 20] == 0).nonzero().flatten().tolist()))
    return eager(module, query, key, value, attention_mask, **kwargs)


modeling_modernbert.eager_attention_forward = recorded
config = ModernBertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    local_attention=8, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
)
model = ModernBertModel._from_config(config, attn_implementation="eager").eval()
with torch.no_grad():
    model(torch.randint(3, 60, (1, 48)))
window, keys = seen[0]
print(f"local_attention=8: sliding_window={window}, query 20 reads {len(keys)} keys, {keys[0]} to {keys[-1]}")
assert window == 5 and keys == list(range(16, 25)), "the behaviour has changed"
PY
