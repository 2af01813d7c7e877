"""The command line, run as a user would: through the typer app, on small inputs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from cli_cases import run, runner
from transformers import BertConfig, BertForMaskedLM

import sa_hf
from sa_hf import available_patterns, patch_model
from sa_hf.config import pattern_class
from sa_hf.errors import SparseAttentionError
from sa_hf.tools.bench import quick
from sa_hf.tools.commands import app
from sa_hf.tools.describe import argument_docs
from sa_hf.tools.inspect import inspect_checkpoint
from sa_hf.tools.options import make_config, parse_options
from sa_hf.tools.suggest import left_out, suggest
from sa_hf.tools.tables import console


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
    (checkpoint / "README.md").write_text("my own")
    result = runner.invoke(app, ["card", str(checkpoint)])
    assert isinstance(result.exception, SparseAttentionError)
    assert (checkpoint / "README.md").read_text() == "my own"
    run("card", str(checkpoint), "--force")


def test_summary_of_a_checkpoint(checkpoint: Path) -> None:
    out = run("summary", str(checkpoint), "--trust-remote-code", "--length", "128")
    assert "bigbird" in out
    assert "dense" in out


def test_equal_layers_stand_in_one_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32
    )
    patch_model(BertForMaskedLM(config), {"0-7": "sparsebert", "8-11": "bigbird"}).save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert [(stack, layers, name) for stack, layers, name, _ in found.grouped()] == [
        ("encoder", "0-7", "sparsebert"),
        ("encoder", "8-11", "bigbird"),
    ]
    assert ("bert.encoder.layer.0-7.attention.self.sparse.step", "I64", "[]") in found.grouped_state()
    out = run("inspect", str(tmp_path))
    assert out.count("bigbird ") == 1
    assert ["encoder", "8-11", "bigbird"] in [line.split()[:3] for line in out.splitlines()]
    rows = [line.split() for line in run("summary", str(tmp_path), "--trust-remote-code").splitlines()]
    assert ["encoder", "0-7", "sparsebert"] in [row[:3] for row in rows]


@pytest.mark.parametrize("columns", [40, 80])
def test_no_line_is_wider_than_the_terminal(columns: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", columns)  # first: the width to go back to is not that of the variable
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (
        ["patterns"], ["patterns", "longnet"], ["inspect", str(checkpoint)], ["suggest", "minilm"], ["doctor"],
        ["summary", str(checkpoint), "--trust-remote-code"], ["preview", "bigbird"],
    ):  # fmt: skip
        result = runner.invoke(app, words, catch_exceptions=False)
        lines = [line for line in result.stdout.splitlines() if "%" not in line]
        assert max(map(len, lines)) <= columns, words


def test_names_of_patterns_are_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 80)
    found = run("suggest", "minilm", "--length", "512", "--text", str(Path(__file__)), "--tokens", "64")
    assert any(line.strip().startswith("sparse_transformer  ") for line in found.splitlines())


def test_patterns_lists_all_and_describes_one() -> None:
    listed = run("patterns")
    for name in available_patterns():
        assert f" {name} " in listed
    for name, config in available_patterns().items():
        told = " ".join(run("patterns", name).split())
        for field in dataclasses.fields(config):
            assert f" {field.name} " in told, (name, field.name)
        for preset in config.presets():
            assert f" {preset} " in told
    bigbird = " ".join(run("patterns", "bigbird").split())
    assert "num_window_blocks int 3 blocks around the own one, itself included; odd, or 0" in bigbird


def test_the_version_is_the_packages() -> None:
    assert run("--version").split() == ["sa_hf", sa_hf.__version__]


def test_the_meanings_of_fields_are_whole_sentences() -> None:
    """All that a docstring says of the fields, and nothing twice: a colon inside a sentence begins no field."""
    assert argument_docs(pattern_class("bigbird"))["block_size"].endswith("than its pairs: tiles stay at 16")
    assert argument_docs(pattern_class("longnet"))["head_offset"].endswith("(the public reference code)")
    for name, config in available_patterns().items():
        own = [f.name for f in dataclasses.fields(config) if f.name not in ("seed", "drop_diagonal")]
        found = argument_docs(config)
        assert set(found) == {"seed", "drop_diagonal", *own}, name
        if own:
            section = " ".join((config.__doc__ or "").partition("Args:")[2].split("\n\n")[0].split())
            for field in own:
                assert f"{found[field]}." in f"{section}.", (name, field)


def test_suggest_says_of_every_pattern_where_it_stands() -> None:
    for causal in (True, False):
        found = suggest(num_heads=2, causal=causal, length=1024)
        reasons = dict(left_out(found, num_heads=2, causal=causal, length=1024))
        assert {s.config.name for s in found} | set(reasons) | {"dense"} == set(available_patterns())
        assert not {s.config.name for s in found} & set(reasons)
    assert reasons["expire_span"] == "causal only"
    assert reasons["longnet"].startswith("keeps 83%")
    causal_reasons = dict(left_out([], num_heads=2, causal=True, length=4096))
    # 1056 of a row's keys, fewer at the start: (1056 * 1057 / 2 + 3040 * 1056) / (4096 * 4097 / 2)
    assert "at most 0.449" in causal_reasons["expire_span"]
    assert "not ranked: sparsebert" in run("suggest", "minilm", "--length", "4096")


@pytest.mark.parametrize(
    "words",
    [
        ["expire_span", "--causal"], ["routing"], ["routing", "--causal"], ["sparsebert"],
        ["sparsebert", "-s", "frozen=true"],
    ],
)  # fmt: skip
def test_bench_serves_patterns_that_learn(words: list[str]) -> None:
    out = run("bench", *words, "--length", "256", "--heads", "2", "--head-dim", "16")
    assert "forward+backward" in out
    assert ("set by hand" if "frozen=true" in words else "untrained") in " ".join(out.split())


def test_bench_names_the_machine() -> None:
    out = " ".join(run("bench", "star", "--length", "64", "--heads", "2", "--head-dim", "16").split())
    assert f"{torch.get_num_threads()} threads, float32" in out
    assert f"torch {torch.__version__}" in out


def test_bench_shows_no_speed_up_where_parity_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "bound_of", lambda dtype: 0.0)
    monkeypatch.setattr("sa_hf.tools.bench.parity.RATIO_FLOOR", 0.0)
    out = run("bench", "expire_span", "--causal", "--length", "64", "--heads", "2", "--head-dim", "16")
    assert "parity failed" in out
    assert "x" not in out.split("not shown")[0].split("speed-up")[1]


def test_suggest_measures_attention_mass() -> None:
    out = run("suggest", "minilm", "--length", "4096", "--text", json.__file__, "--tokens", "128")
    assert "encoder, bidirectional, 4096 tokens" in out
    assert "at 128:" in out
    # Windows of 512 keep all of 128 tokens, which says nothing about them.
    assert "longnet: nearly all pairs of 128 tokens" in " ".join(out.split())


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
