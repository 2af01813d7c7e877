#!/usr/bin/env bash
# transformers 5.24.0: a backbone that save_pretrained wrote is loaded from its folder by its own class, and by no call
# of AutoBackbone.from_pretrained: that asks the hub first whether a repository of the folder's name is there.
# Seen: Dinov2Backbone gives its outputs again; AutoBackbone raises HFValidationError for an absolute path.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import tempfile

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoBackbone, Dinov2Backbone, Dinov2Config

torch.manual_seed(0)
config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
model = Dinov2Backbone(config).eval()
image = torch.randn(1, 3, 16, 16)
with tempfile.TemporaryDirectory() as saved:
    model.save_pretrained(saved)
    own = Dinov2Backbone.from_pretrained(saved).eval()
    with torch.no_grad():
        same = torch.equal(own(image).feature_maps[0], model(image).feature_maps[0])
    print(f"by its own class: the same outputs: {same}")
    try:
        AutoBackbone.from_pretrained(saved)
        raised = None
    except HFValidationError as error:
        raised = str(error)
print(f"by AutoBackbone: {raised}")
assert same and raised is not None and "Repo id" in raised, "the behaviour has changed"
PY
