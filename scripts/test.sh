#!/usr/bin/env bash
# Sets everything up and runs the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh test

# One worker per core of a small machine, each with one thread: two pools of threads on two cores slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" "$@"
