"""The command line, run as a user would: through the typer app, on small inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BigBirdConfig, BigBirdForMaskedLM
from typer.testing import CliRunner

from sa_hf import patch_model
from sa_hf.errors import SparseAttentionError
from sa_hf.tools.cli import main
from sa_hf.tools.commands import app
from sa_hf.tools.load import make_config, parse_options

runner = CliRunner()


def run(*words: str) -> str:
    result = runner.invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128,
    )  # fmt: skip
    model = patch_model(BertForMaskedLM(config), {"0": "dense", "1-": "bigbird"})
    folder = tmp_path_factory.mktemp("sparse")
    model.save_pretrained(folder)
    return folder


def test_preview_draws_the_window() -> None:
    drawn = run("preview", "sliding_window", "--length", "64", "--set", "window=8", "--causal")
    lines = [line for line in drawn.splitlines() if line.strip()]
    # A causal window leaves the upper right corner empty and marks the diagonal.
    assert len(lines) > 8
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(("pattern", "length"), [("bigbird", 2048), ("sliding_window", 4096), ("star", 256)])
def test_preview_finds_a_length_that_shows_the_pattern(pattern: str, length: int) -> None:
    drawn = run("preview", pattern)
    assert f"n = {length}," in drawn
    assert " " in drawn.splitlines()[len(drawn.splitlines()) // 2]
    assert "n = 64," in run("preview", pattern, "--length", "64")
    assert "n = 256, bidirectional, 100.00%" in run("preview", "dense")


def test_preview_writes_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "bigbird.png"
    run("preview", "bigbird", "--length", "512", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_lists_each_layer(checkpoint: Path) -> None:
    out = run("inspect", str(checkpoint))
    assert "bigbird" in out
    assert "BertForMaskedLM" in out


def test_inspect_of_a_dense_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "dense checkpoint" in result.output


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"sa_hf": {"layers": {"encoder": {"0": 3}}}}, "encoder layer 0"),
        ({"sa_hf": {"layers": {"encoder": {"0": {"heads": 3}}}}}, "encoder layer 0"),
        ({"sa_hf": {"layers": {"encoder": {"0": {"name": "bigbrid"}}}}}, "did you mean 'bigbird'"),
        ({"sa_hf": {"layers": [1]}}, "names no layers"),
        ({"sa_hf": {"layers": {"encoder": [1]}}}, "names no layers"),
        ({"sa_hf": {}, "auto_map": {"AutoModel": "modeling_sa_hf.X"}}, "modeling_sa_hf.py, which is not in the folder"),
        ({"sa_hf": {}, "auto_map": {"AutoModel": "some/repo--modeling_sa_hf.X"}}, "another repository"),
        ({"sa_hf": {}, "auto_map": 5}, "no auto_map"),
    ],
)
def test_inspect_says_what_is_wrong_with_a_checkpoint(config: object, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert problem in " ".join(result.output.split())


def test_inspect_of_no_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(SparseAttentionError, match="holds list"):
        run("inspect", str(tmp_path))


def test_card_holds_the_loading_line_and_is_not_overwritten(checkpoint: Path) -> None:
    run("card", str(checkpoint), "--base-model", "tiny")
    text = (checkpoint / "README.md").read_text()
    assert "AutoModelForMaskedLM.from_pretrained" in text
    assert "trust_remote_code=True" in text
    assert "pypi" not in text
    assert "base_model: tiny" in text
    result = runner.invoke(app, ["card", str(checkpoint)])
    assert isinstance(result.exception, SparseAttentionError)
    run("card", str(checkpoint), "--force")


def test_summary_of_a_checkpoint(checkpoint: Path) -> None:
    out = run("summary", str(checkpoint), "--trust-remote-code", "--length", "128")
    assert "bigbird" in out
    assert "dense" in out


def test_suggest_measures_attention_mass() -> None:
    out = run("suggest", "minilm", "--length", "4096", "--text", json.__file__, "--tokens", "128")
    assert "encoder, bidirectional, 4096 tokens" in out
    assert "128: pairs" in " ".join(out.split())
    # Windows of 512 keep all of 128 tokens, which says nothing about them.
    assert "longnet: nearly all pairs of 128 tokens" in out


def test_suggest_takes_a_sparse_checkpoint(checkpoint: Path) -> None:
    assert "encoder, bidirectional" in run("suggest", str(checkpoint), "--trust-remote-code", "--length", "2048")


def test_bench_prints_a_speed_up_after_parity() -> None:
    out = run("bench", "sliding_window", "--length", "256", "--set", "window=32", "--heads", "2", "--head-dim", "16")
    assert "forward+backward" in out
    assert "x" in out


def test_doctor_finds_an_engine() -> None:
    out = runner.invoke(app, ["doctor"]).output
    assert "engine native" in out
    assert "WRONG" not in out


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["window=5"], {"window": 5}),
        (["segment_length=[2, 4]"], {"segment_length": (2, 4)}),
        (["segment_length=16,64"], {"segment_length": (16, 64)}),
        (["segment_length=(16, 64)"], {"segment_length": (16, 64)}),
        (["segment_length=(16,)"], {"segment_length": (16,)}),
        (["layers=0-3,6"], {"layers": "0-3,6"}),
        (["kind=fixed"], {"kind": "fixed"}),
        (["x=null"], {"x": None}),
        (["r=true"], {"r": True}),
    ],
)
def test_options_are_parsed_as_json(pairs: list[str], expected: dict[str, object]) -> None:
    assert parse_options(pairs) == expected


def test_the_hint_for_a_sequence_can_be_typed() -> None:
    with pytest.raises(SparseAttentionError, match="typed so: segment_length=512,1024") as wrong:
        make_config("longnet", ["segment_length=64"])
    hint = str(wrong.value).rpartition(": ")[2]
    assert make_config("longnet", [hint, "dilated_ratio=1,2"]).segment_length == (512, 1024)


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
        (["bench", "bigbird", "--heads", "0"], "empty dimension"),
        (["bench", "bigbird", "--length", "0"], "empty dimension"),
        (["suggest", "minilm", "--length", "0"], "nearest: 1"),
        (["suggest", "minilm", "--text", "/nowhere.txt"], "/nowhere.txt"),
        (["suggest", "minilm", "--text", json.__file__, "--tokens", "5000"], "model's limit of 512; nearest: 512"),
        (["suggest", "minilm", "--text", json.__file__, "--tokens", "1"], "nearest: 2"),
        (["summary", "/nowhere"], "/nowhere"),
        (["convert", "/nowhere", "out"], "/nowhere"),
        (["card", "/nowhere"], "/nowhere"),
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
