#!/usr/bin/env bash
# sentence-transformers 6.2.0: encode() calls forward() of the wrapped transformers model, not the model: forward hooks that
# a user or another library registered on it never run.
# Seen: a forward hook on the model itself runs 0 times, one on its encoder once.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging
import tempfile
from pathlib import Path

from transformers import BertConfig, BertModel, BertTokenizerFast
from sentence_transformers import SentenceTransformer

logging.disable(logging.WARNING)
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    BertTokenizerFast(str(Path(folder) / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(folder)
    sentences = SentenceTransformer(folder, device="cpu")
bert, ran = sentences[0].auto_model, {"model": 0, "encoder": 0}
for name, module in (("model", bert), ("encoder", bert.encoder)):
    module.register_forward_hook(lambda *_, name=name: ran.update({name: ran[name] + 1}))
sentences.encode(["a b"])
print(f"forward hooks that ran: {ran}")
assert ran == {"model": 0, "encoder": 1}, "the behaviour has changed"
PY
