#!/usr/bin/env bash
# transformers 5.24.0: Trainer shifts the labels under label_smoothing_factor only where the class has a name that it knows.
# A subclass of LlamaForCausalLM with a name of its own is trained to repeat its input.
# Seen: with a factor of 1e-9 the loss stays 4.209 for LlamaForCausalLM and becomes 4.182 for the subclass.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

logging.disable(logging.WARNING)


class MyLlama(LlamaForCausalLM):
    pass


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
base = LlamaForCausalLM(config).eval()
mine = MyLlama(config).eval()
mine.load_state_dict(base.state_dict())
tokens, change = torch.randint(0, 64, (2, 12)), {}
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    for model in (base, mine):
        losses = []
        for factor in (0.0, 1e-9):
            arguments = TrainingArguments(folder, label_smoothing_factor=factor, report_to=[], use_cpu=True)
            batch = {"input_ids": tokens, "labels": tokens.clone()}
            losses.append(float(Trainer(model=model, args=arguments).compute_loss(model, batch)))
        change[type(model).__name__] = abs(losses[1] - losses[0])
        print(f"{type(model).__name__}: loss {losses[0]:.4f} without smoothing, {losses[1]:.4f} with a factor of 1e-9")
assert change["LlamaForCausalLM"] < 1e-5 and change["MyLlama"] > 1e-3, "the behaviour has changed"
PY
