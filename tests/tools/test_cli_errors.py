"""The command line given what is wrong: one line that names the value, the rule and what is near."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import runner
from safetensors.torch import save_file
from transformers import BigBirdConfig, BigBirdForMaskedLM

from sa_hf.errors import SparseAttentionError
from sa_hf.tools.cli import main
from sa_hf.tools.commands import app


@pytest.mark.parametrize(
    "words",
    [
        ["preview", "bigbrid"],
        ["preview", "bigbird", "--set", "block_size=48"],
        ["preview", "bigbird", "--set", "blocksize=64"],
        ["preview", "bigbird", "--plot", "bigbird.foo"],
        ["bench", "bigbird", "--set", "seed=x"],
    ],
)
def test_bad_input_is_one_clear_error(words: list[str]) -> None:
    result = runner.invoke(app, words)
    assert isinstance(result.exception, SparseAttentionError)
    assert "bigbird" in str(result.exception).lower()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "bigbird", "--heads", "0"], "'--heads': 0 must be at least 1; nearest: 1"),
        (["bench", "bigbird", "--length", "0"], "'--length': 0 must be at least 1; nearest: 1"),
        (["preview", "bigbird", "--length", "0"], "'--length': 0 must be at least 1; nearest: 1"),
        (["preview", "bigbird", "--length", "x"], "see `sa-hf preview --help`"),
        (["preview", "bigbrid"], "did you mean 'bigbird'"),
        (["preview", "bigbird", "--preset", "papre"], "did you mean 'paper'"),
        (["preview", "bigbird", "-s", "window"], "e.g. block_size=64 (did you mean 'num_window_blocks'?); fields: ["),
        (["preview", "bigbird", "-s", "block_size"], "e.g. block_size=64"),
        (["preview", "bigbird", "-s", "block_size=16", "-s", "block_size=32"], "given twice"),
        (["preview", "bigbird", "-s", "blocksize=16"], "did you mean 'block_size'?); fields: ["),
        (["patterns", "starr"], "did you mean 'star'"),
        (["previw", "bigbird"], "see `sa-hf --help`"),
        (["bench"], "Missing argument"),
        (["bench", "expire_span", "--length", "64"], "Here: --causal"),
        (["summary", "minilm"], "add --pattern NAME"),
        (["summary", "minilm", "--preset", "paper"], "need --pattern NAME"),
        (["convert", "/nowhere", "out", "--preset", "papre"], "did you mean 'paper'"),
        (["suggest", "minilm", "--tokens", "64"], "add --text FILE"),
        (["suggest", "minilm", "--length", "0"], "nearest: 1"),
        (["suggest", "minilm", "--text", "/nowhere.txt"], "/nowhere.txt"),
        (["suggest", "minilm", "--text", json.__file__, "--tokens", "5000"], "model's limit of 512; nearest: 512"),
        (["suggest", "minilm", "--text", json.__file__, "--tokens", "1"], "nearest: 2"),
        (["suggest", "minilm", "--text", os.devnull], "holds no text"),
        (["suggest", "nowhere", "--text", json.__file__, "--mixture", "m.yaml", "--budget", "2"], "budget=2.0"),
        (["suggest", "nowhere", "--text", json.__file__, "--mixture", "/nowhere/m.yaml"], "no folder /nowhere"),
        (["summary", "/nowhere"], "/nowhere"),
        (["convert", "/nowhere", "out"], "/nowhere"),
        (["card", "/nowhere"], "/nowhere"),
        (["suggest", "nowhere"], "'nowhere' is no folder here, and the hub did not give it"),
        (["suggest", "minlm"], "(did you mean 'minilm'?); a model is a folder of save_pretrained, a hub name"),
        (["convert", "nowhere", "out"], "'nowhere' is no folder here, and the hub did not give it"),
        (["evaluate", "--model", "nowhere"], "'nowhere' is no folder here, and the hub did not give it"),
        (["suggest", __file__], "test_cli_errors.py' is a file; a model is a folder"),
        (["preview", "bigbird", "--plot", "/nowhere/x.png"], "/nowhere/x.png"),
    ],
)
def test_a_run_with_bad_input_ends_with_its_message(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sa-hf", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def stopped(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a run ends."""
    monkeypatch.setattr("sys.argv", ["sa-hf", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sa-hf: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", ["summary", "suggest"])
def test_a_sparse_checkpoint_asks_for_trust(
    command: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--trust-remote-code" in stopped([command, str(checkpoint)], monkeypatch, capsys)


@pytest.mark.parametrize("command", ["suggest", "inspect"])
def test_a_wrong_folder_names_the_near_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-10" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'run/checkpoint-10'" in stopped([command, "run/checkpont-10"], monkeypatch, capsys)
    assert "config.json (nearest: 'run/checkpoint-10')" in stopped([command, "run"], monkeypatch, capsys)


def test_inspect_of_an_adapter_names_its_base(checkpoint: Path, tmp_path: Path) -> None:
    state = {"model.layer.1.sparse.logits": torch.zeros(3)}
    save_file(state, tmp_path / "adapter_model.safetensors")

    def inspected(base: str) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        return " ".join(runner.invoke(app, ["inspect", str(tmp_path)]).output.split())

    shown = inspected(str(checkpoint))
    assert f"an adapter; its base {checkpoint}: BertForMaskedLM" in shown
    assert "bigbird" in shown
    assert "sparse.logits" in shown
    assert "an adapter; its base some/model: unknown" in inspected("some/model")
    assert "problem" not in inspected("some/model")
    assert "problem: its base: '/moved' is no folder here" in inspected("/moved")


@pytest.mark.parametrize("command", ["summary", "plot", "card"])
def test_an_adapter_is_no_model_of_its_own(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/its/base"}))
    assert "is an adapter of '/its/base'" in stopped([command, str(tmp_path)], monkeypatch, capsys)


def test_convert_names_an_unknown_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BigBirdConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BigBirdForMaskedLM(config).save_pretrained(tmp_path / "source")
    words = ["convert", str(tmp_path / "source"), str(tmp_path / "out"), "-s", "block_siz=16"]
    assert "did you mean 'block_size'" in stopped(words, monkeypatch, capsys)


def test_without_the_extra_the_command_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "sa_hf.tools.commands")
    assert "pip install '.[tools]'" in stopped(["doctor"], monkeypatch, capsys)
