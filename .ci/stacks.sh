#!/usr/bin/env bash
# Runs tests/stacks, sa_hf inside other libraries, with the extra "stacks": its libraries lie in an environment of their
# own over the packages of .venv, whose torch and transformers they must leave as they are. No test may be skipped.
# Usage: bash .ci/stacks.sh        (after scripts/setup.sh test)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. .ci/overlay.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1

mapfile -t stacks < <(.venv/bin/python -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["stacks"], sep="\n")')
home=.venv/stacks
overlay "$home" --constraint .ci/constraints.txt "${stacks[@]}"
versions='from importlib.metadata import version; print(*(f"{n} {version(n)}" for n in ("torch", "transformers", "peft")))'
found="$("$home/bin/python" -c "$versions")" ours="$(.venv/bin/python -c "$versions")"
if [ "$found" != "$ours" ]; then
  echo "stacks: the extra brings $found beside $ours" >&2
  exit 1
fi
log="$home/log"
if ! HF_HUB_OFFLINE=1 "$home/bin/python" -m pytest -n "${TEST_WORKERS:-2}" -p no:cacheprovider tests/stacks > "$log" 2>&1 \
  || grep -q skipped "$log"; then
  tail -n 100 "$log"
  echo "stacks: tests FAILED, or were skipped"
  exit 1
fi
echo "stacks: $(du -sm "$home" | cut -f1) MB over .venv: $(tail -n 1 "$log")"
