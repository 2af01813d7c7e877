#!/usr/bin/env bash
# datasets 5.2.0: load_dataset(folder) goes by the first of its naming patterns that fits any file, and drops the files that
# it does not name: corpus.txt beside a folder validation/ is in no split, and nothing says so.
# Seen: the only split is validation; the two rows of corpus.txt are gone.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PY'
import tempfile
from pathlib import Path

from datasets import load_dataset

with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
    (Path(folder) / "validation").mkdir()
    (Path(folder) / "corpus.txt").write_text("to train on\nand this\n")
    (Path(folder) / "validation" / "x.txt").write_text("held out\n")
    splits = {name: split["text"][:] for name, split in load_dataset(folder, cache_dir=cache).items()}
print(splits)
assert splits == {"validation": ["held out"]}, "the behaviour has changed"
PY
