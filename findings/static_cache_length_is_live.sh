#!/usr/bin/env bash
# transformers 5.24.0: get_seq_length() of a StaticCache returns the cache's own counter, a tensor that the next forward
# advances in place. A length read before a call is another number after it; of a DynamicCache it is a plain int.
# Seen: read after 5 tokens: DynamicCache says 5, StaticCache says 10 once five more tokens went through.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
model = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 64, (1, 5))
seen = {}
for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=32)):
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        length = cache.get_seq_length()
        model(tokens, past_key_values=cache)
    seen[type(cache).__name__] = int(length)
    print(f"{type(cache).__name__}: a {type(length).__name__} read after 5 tokens, {int(length)} five tokens later")
assert seen == {"DynamicCache": 5, "StaticCache": 10}, "the behaviour has changed"
PY
