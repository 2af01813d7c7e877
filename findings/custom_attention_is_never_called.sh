#!/usr/bin/env bash
# transformers 5.24.0: AutoModel.from_config(..., attn_implementation=NAME) takes a registered attention function for models
# that never ask the interface. config says NAME, no call reaches it, nothing is raised.
# Seen: BERT calls it once per layer; MPNet, DeBERTa-v2 and RoFormer report it in their config and never call it.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel
from transformers.masking_utils import sdpa_mask

calls = []


def counted(module, query, key, value, attention_mask, **kwargs):
    calls.append(module)
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", counted)
AttentionMaskInterface.register("counted", sdpa_mask)
small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
seen = {}
for kind in ("bert", "mpnet", "deberta-v2", "roformer"):
    calls.clear()
    config = AutoConfig.for_model(kind, **small)
    model = AutoModel.from_config(config, attn_implementation="counted").eval()
    with torch.no_grad():
        model(torch.randint(5, 60, (1, 8)))
    seen[kind] = len(calls)
    print(f"{kind}: config says {model.config._attn_implementation!r}, called {len(calls)} times in 2 layers")
assert seen["bert"] == 2, "BERT no longer asks the interface"
assert seen["mpnet"] == seen["deberta-v2"] == seen["roformer"] == 0, "the behaviour has changed"
PY
