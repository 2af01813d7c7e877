"""What the tests of the command line share: it is run as a user would, through the typer app."""

from __future__ import annotations

from typer.testing import CliRunner

from sa_hf.tools.commands import app

runner = CliRunner()


def run(*words: str) -> str:
    result = runner.invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
