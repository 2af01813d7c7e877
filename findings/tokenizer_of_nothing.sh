#!/usr/bin/env bash
# transformers 5.24.0: AutoTokenizer.from_pretrained of a folder that holds a model and no tokenizer file gives a tokenizer
# without a vocabulary and no error: every word of a text becomes [UNK].
# Seen: BERT: a text of two words is [CLS] [UNK] [UNK] [SEP].
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging
import tempfile

from transformers import AutoTokenizer, BertConfig

logging.disable(logging.WARNING)
with tempfile.TemporaryDirectory() as folder:
    BertConfig().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
words = tokenizer.convert_ids_to_tokens(tokenizer("a text").input_ids)
print(f"{type(tokenizer).__name__} of {len(tokenizer)} tokens: {words}")
assert words == ["[CLS]", "[UNK]", "[UNK]", "[SEP]"] and len(tokenizer) < 10, "the behaviour has changed"
PY
