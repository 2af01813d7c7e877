#!/usr/bin/env bash
# datasets 5.2.0: a CSV whose rows have one value more than its header is read without an error. The first value becomes a
# column of its own and all others move by one: texts stand under label, labels under a name that no header has.
# Seen: text,label with rows of three values: text holds the second value, label the third.
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

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "rows.csv"
    file.write_text("text,label\nfirst,one,0\nsecond,two,1\n")
    rows = load_dataset("csv", data_files=str(file), cache_dir=folder, split="train")[:]
print(rows)
assert rows["text"] == ["one", "two"] and rows["label"] == [0, 1], "the behaviour has changed"
PY
