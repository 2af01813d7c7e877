"""Users without a home, or with one that cannot be written: the whole of a fine-tuning, with no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_cases import DECODER, FEW_STEPS, SCRIPTS

from sa_hf.tasks.homes import BELOW_HOME, HOME, TRITON, unusable_caches

FLAGS = [*FEW_STEPS, *DECODER, "--pattern", "bigbird", "--set", "block_size=16"]
CACHES = ("HF_HOME", *BELOW_HOME, TRITON, "TRITON_HOME", "XDG_CACHE_HOME", "SA_HF_CACHE_DIR", "HOME")


def test_which_caches_need_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(**environment: str) -> list[str]:
        monkeypatch.setenv("HOME", environment.get("HOME", str(tmp_path / "home")))
        return unusable_caches(environment)

    (tmp_path / "file").write_text("")
    no_home = str(tmp_path / "file" / "home")
    assert found() == []
    assert found(HOME=no_home) == [*BELOW_HOME, TRITON]
    assert found(HOME=no_home, HF_HOME=str(tmp_path), TRITON_HOME=str(tmp_path)) == []
    assert found(HOME=no_home, XDG_CACHE_HOME=str(tmp_path)) == [TRITON]
    assert found(HOME=no_home, HF_MODULES_CACHE="x", TRITON_CACHE_DIR="y") == ["HF_DATASETS_CACHE"]
    # What expanduser leaves as it is: a user without HOME whom the system does not know.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert unusable_caches({}) == [HOME, TRITON]


def bound(command: list[str]) -> list[str]:
    """The command under the modes of files, which root may pass over."""
    if os.geteuid() != 0:
        return command
    tool = shutil.which("setpriv")
    if tool is None:
        pytest.skip("root may write everywhere, and setpriv is not here")
    return [tool, "--bounding-set", "-all", "--inh-caps", "-all", *command]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_read_only_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    (tmp_path / "texts.txt").write_text("\n\n".join(f"document {i} " * 40 for i in range(20)))
    environment = {name: value for name, value in os.environ.items() if name not in CACHES} | {"HOME": str(home)}
    command = [sys.executable, str(SCRIPTS / "finetune.py"), *FLAGS, "--dataset", str(tmp_path / "texts.txt")]
    ended = subprocess.run(
        bound([*command, "--output_dir", str(tmp_path / "out")]), env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert '"reload_verified": true' in ended.stdout
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("caches: no home that can be written, so HF_MODULES_CACHE")
    assert not list(home.iterdir())
