#!/usr/bin/env bash
# peft 0.21.2: merge_and_unload() of IA3, LoHa, VeRA, OFT, BOFT and FourierFT raises AttributeError where modules_to_save
# names a module without a parameter called weight, such as RoBERTa's classification head, which task_type="SEQ_CLS"
# names by itself. LoRA merges. (https://github.com/huggingface/peft/issues/3114 says it of GraLoRA.)
# Seen: 'RobertaClassificationHead' object has no attribute 'weight' of all six, after training that went well.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import torch
from peft import BOFTConfig, FourierFTConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
targets = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
configs = [
    LoraConfig(**targets), IA3Config(**targets, feedforward_modules=[]), LoHaConfig(**targets), VeraConfig(**targets),
    OFTConfig(**targets), BOFTConfig(**targets), FourierFTConfig(**targets, n_frequency=50),
]
raised = {}
for config in configs:
    model = get_peft_model(RobertaForSequenceClassification(RobertaConfig(vocab_size=64, **sizes)), config)
    model(torch.arange(3, 12)[None], labels=torch.tensor([1])).loss.backward()
    try:
        model.merge_and_unload()
    except AttributeError as error:
        raised[type(config).__name__] = str(error)
print(raised)
assert len(raised) == 6 and "LoraConfig" not in raised, "the behaviour has changed"
PY
