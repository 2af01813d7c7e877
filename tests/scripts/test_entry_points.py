"""The scripts and the installed package run one code, and a user's mistake ends in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from finetune_cases import SCRIPTS

from sa_hf.tools import cli, evaluate, finetune


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("finetune", ["--dataset", "nofile.csv"], "dataset 'nofile.csv' does not exist"),
        ("evaluate", ["--model", "./nowhere"], "--model './nowhere' is no folder here"),
    ],
)
def test_a_mistake_ends_a_script_with_one_line(name: str, flags: list[str], message: str) -> None:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("module", [finetune, evaluate])
def test_the_help_names_the_command_that_was_typed(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"], prog="sa-hf something")
    assert capsys.readouterr().out.startswith("usage: sa-hf something")


@pytest.mark.parametrize("name", ["finetune", "evaluate"])
def test_the_command_reads_the_same_flags(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["sa-hf", name, *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    code, told, _ = typed("--help")
    assert code == 0
    assert told.startswith(f"usage: sa-hf {name}")
    assert "--max_length" in told
    if name == "evaluate":
        return
    code, _, error = typed("--dataset", "nofile.csv", "--max_length", "64")
    assert code == 2
    assert error.startswith("sa-hf: dataset 'nofile.csv' does not exist")
    assert error.count("\n") == 1
