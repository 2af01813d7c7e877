#!/usr/bin/env bash
# accelerate 1.15.0: a FullyShardedDataParallelPlugin(fsdp_version=2) given to an Accelerator of CPU processes is ignored:
# prepare() returns DistributedDataParallel, with whole parameters on every rank. torch's own fully_shard runs on gloo.
# Seen: distributed_type MULTI_CPU and DistributedDataParallel, no warning.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import os
import socket
import warnings

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), cpu=True)
    model = accelerator.prepare(torch.nn.Linear(4, 4))
said = [str(w.message) for w in caught if "fsdp" in str(w.message).lower()]
print(f"{accelerator.distributed_type}, {type(model).__name__}, warnings of FSDP: {said}")
accelerator.end_training()
assert type(model).__name__ == "DistributedDataParallel" and not said, "the behaviour has changed"
PY
