#!/usr/bin/env bash
# transformers 5.24.0: get_last_checkpoint, what Trainer resumes from, goes by the number in a folder name alone: a checkpoint
# whose saving was cut short is taken before the whole one.
# Seen: checkpoint-20, which holds nothing but a config, is chosen over a whole checkpoint-10.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import get_last_checkpoint

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(Path(folder) / "checkpoint-10")
    (Path(folder) / "checkpoint-10" / "trainer_state.json").write_text("{}")
    config.save_pretrained(Path(folder) / "checkpoint-20")  # as far as a save came that was cut short
    chosen = Path(get_last_checkpoint(folder)).name
print(f"chosen: {chosen}")
assert chosen == "checkpoint-20", "the behaviour has changed"
PY
