#!/usr/bin/env bash
# transformers 5.24.0: Llama4ForConditionalGeneration.forward raises AttributeError on text alone, since it asks the output
# of its language model for image_outputs, which that has not. The language model by itself runs.
# Seen: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import logging

import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

logging.disable(logging.WARNING)
torch.manual_seed(0)
text = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}
vision = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}
model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).eval()
tokens = torch.tensor([[5, 6, 7]])
with torch.no_grad():
    print("language model:", tuple(model.language_model(input_ids=tokens).logits.shape))
    try:
        model(input_ids=tokens)
    except AttributeError as error:
        print("whole model:", error)
    else:
        raise SystemExit("the behaviour has changed")
PY
