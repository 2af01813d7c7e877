#!/usr/bin/env bash
# trl 1.16.0: DPOTrainer(ref_model=None) does not copy the model that it is given: it loads the reference from the folder by
# the class named in config.architectures. What a subclass or a wrapper changed in the model is not in its reference.
# Seen: the policy is Mine, the reference LlamaForCausalLM; the same tokens give other logits, so training starts off the reference.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

logging.disable(logging.WARNING)


class Mine(LlamaForCausalLM):
    """Half of every logit: stands for any change that a subclass makes."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


torch.manual_seed(0)
words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "[EOS]": 3}, unk_token="[UNK]"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[EOS]", pad_token="[EOS]")
config = LlamaConfig(
    vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = DPOTrainer(
        model=Mine.from_pretrained(folder),
        args=DPOConfig(folder, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}]),
        processing_class=tokenizer,
    )
policy, reference = trainer.model, trainer.ref_model
tokens = torch.tensor([[0, 1, 0]])
with torch.no_grad():
    off = float((policy(tokens).logits - reference(tokens).logits).abs().max())
print(f"policy {type(policy).__name__}, reference {type(reference).__name__}, logits {off:.2g} apart before any step")
assert type(reference) is LlamaForCausalLM and off > 1e-3, "the behaviour has changed"
PY
