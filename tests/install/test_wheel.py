"""The wheel, built and installed away from the checkout, runs the first lines of the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sa_hf

ROOT = Path(__file__).parents[2]
# Kept out of what is built: else the checkout's own build folder would be packed.
COPIED = ("sa_hf", "pyproject.toml", "README.md", "LICENSE")
MODEL = """
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
open("vocab.txt", "w").write("\\n".join(words))
BertTokenizer("vocab.txt", model_max_length=512).save_pretrained("bert-base-uncased")
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained("bert-base-uncased")
"""
CHECKED = """
import sa_hf
assert sa_hf.__file__.startswith(SITE), sa_hf.__file__
assert tokenizer.model_max_length == model.config.max_position_embeddings == 4096
again = AutoModelForSequenceClassification.from_pretrained("bert-4k", trust_remote_code=True)
ids = tokenizer("a b " * 400, return_tensors="pt")
assert ids.input_ids.shape[1] == 802, ids.input_ids.shape
import torch
with torch.no_grad():
    assert torch.equal(model.eval()(**ids).logits, again.eval()(**ids).logits)
"""


def run(command: list[str], folder: Path, **environment: str) -> str:
    told = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in COPIED:
        run(["cp", "-r", str(ROOT / name), str(folder / "source")], folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    try:
        import setuptools  # noqa: F401

        pip.append("--no-build-isolation")
    except ImportError:
        pass
    run([*pip, str(folder / "source")], folder)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_types_data_and_facts(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        told = Parser().parsestr(file.read(f"sa_hf-{sa_hf.__version__}.dist-info/METADATA").decode())
        commands = file.read(f"sa_hf-{sa_hf.__version__}.dist-info/entry_points.txt").decode()
    # All that lies in the package is in the wheel: sources of C++, tables, the mark of types.
    here = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "sa_hf").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }  # fmt: skip
    assert "sa_hf/py.typed" in names
    assert here - names == set()
    assert "sa-hf = sa_hf.tools.cli:main" in commands
    assert told["Version"] == sa_hf.__version__
    assert told["Keywords"]
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    assert set(told.get_all("Provides-Extra", [])) >= {"demo", "tools", "peft", "test"}
    assert told["Requires-Python"] == ">=3.11"


def test_the_readmes_first_lines_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    (lines,) = re.findall(r"```python\n(.*?bert-4k.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], work)
    program = MODEL + lines + CHECKED.replace("SITE", repr(str(site)))
    run([sys.executable, "-c", program], work, PYTHONPATH=str(site), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    # The command that the wheel brings.
    told = run([sys.executable, str(site / "bin" / "sa-hf"), "finetune", "--help"], work, PYTHONPATH=str(site))
    assert told.startswith("usage: sa-hf finetune")
