#!/usr/bin/env bash
# Runs tests of hf, learned and saving on the other releases of transformers that we claim: the oldest, and the newest
# that the registry gives (left out where it is the pinned one, on which the whole suite runs). Each release lies in an
# environment of its own that holds transformers and what it needs otherwise, over the packages of .venv.
# Usage: bash .ci/matrix.sh        (after scripts/setup.sh test)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. .ci/overlay.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1
tests=(
  tests/hf/test_releases.py tests/hf/test_sparse_cache.py tests/hf/test_generation.py tests/hf/test_families.py
  tests/learned/test_learned_in_models.py tests/saving/test_round_trip.py
)

oldest="$(.venv/bin/python -c 'from sa_hf.hf.state.versions import FLOOR; print(FLOOR)')"
pinned="$(sed -n 's/^transformers==//p' .ci/constraints.txt)"
newest="$(.venv/bin/python -m pip install --quiet --dry-run --ignore-installed --no-deps --report - transformers \
  | .venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])')"

run_on() { # version
  local home=".venv/transformers-$1" log
  local python="$home/bin/python"
  overlay "$home" "transformers==$1"
  found="$("$python" -c 'import transformers; print(transformers.__version__)')"
  case "$found" in "$1" | "$1".0) ;; *) echo "matrix: transformers $found instead of $1" >&2; return 1 ;; esac
  log="$home/log"
  if ! HF_HUB_OFFLINE=1 "$python" -m pytest -n "${TEST_WORKERS:-2}" -p no:cacheprovider "${tests[@]}" > "$log" 2>&1; then
    tail -n 100 "$log"
    echo "matrix: tests FAILED on transformers $found"
    return 1
  fi
  echo "matrix: transformers $found: $(tail -n 1 "$log")"
}

run_on "$oldest"
if [ "$newest" = "$pinned" ]; then
  echo "matrix: the newest release is the pinned one, $pinned: the whole suite runs on it"
else
  run_on "$newest"
fi
