"""Without matplotlib: pictures end in one line that names the extra, and all else works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from sa_hf import BigBirdAttentionConfig, patch_model
from sa_hf.tools.cli import main

EXTRA = "drawing needs matplotlib: pip install '.[tools]'"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = tmp_path_factory.mktemp("sparse")
    patch_model(BertModel(BertConfig(vocab_size=64, **sizes)), "bigbird").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {"matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)


def ended(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a run of the command line."""
    monkeypatch.setattr("sys.argv", ["sa-hf", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.parametrize("command", ["preview", "plot"])
def test_a_picture_asks_for_the_extra(
    command: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(tmp_path / "picture.png")
    words = {
        "preview": ["preview", "bigbird", "--plot", picture],
        "plot": ["plot", str(checkpoint), "--trust-remote-code", "--out", picture],
    }
    assert ended(words[command], monkeypatch) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sa-hf: ")]
    assert len(lines) == 1
    assert EXTRA in lines[0]
    assert not Path(picture).exists()


def test_a_config_asks_for_the_extra(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"pip install '\.\[tools\]'"):
        BigBirdAttentionConfig().plot(tmp_path / "picture.png", 256)


@pytest.mark.parametrize("command", ["patterns", "preview", "inspect", "summary", "card"])
def test_all_else_works(
    command: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "patterns": ["patterns", "bigbird"],
        "preview": ["preview", "bigbird"],
        "inspect": ["inspect", str(checkpoint)],
        "summary": ["summary", str(checkpoint), "--trust-remote-code"],
        "card": ["card", str(checkpoint)],
    }
    assert ended(words[command], monkeypatch) == 0
    assert capsys.readouterr().out
