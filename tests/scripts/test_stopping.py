"""Training that is cut short: Ctrl-C, a partial checkpoint, a disk that is full; what was kept is whole."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_cases import DECODER, FEW_STEPS, SCRIPTS
from safetensors.torch import save_file

from sa_hf import SparseAttentionError
from sa_hf.tasks.verify import load_saved
from sa_hf.tools import finetune
from sa_hf.tools.stopping import checkpoint_to_resume, writing

FLAGS = [*FEW_STEPS, *DECODER, "--pattern", "bigbird", "--set", "block_size=16", "--verify", "none"]


def checkpoint(folder: Path, *, state: str | None = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.ones(99)}, folder / "model.safetensors")
    torch.save({"step": torch.ones(99)}, folder / "optimizer.pt")
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def test_auto_passes_over_what_was_not_saved_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint_to_resume("auto", tmp_path / "nothing") is None
    whole = checkpoint(tmp_path / "checkpoint-9")
    checkpoint(tmp_path / "checkpoint-10", state='{"global_step": 1')
    checkpoint(tmp_path / "checkpoint-11", state=None)
    (tmp_path / "checkpoint-12").mkdir()
    assert checkpoint_to_resume("auto", tmp_path) == whole
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" is passed over: ")[0][-2:] for line in told] == ["12", "11", "10"]
    with pytest.raises(SparseAttentionError, match=r"checkpoint-11: it has no trainer_state.json.*checkpoint-9"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-11"), tmp_path)
    with pytest.raises(SparseAttentionError, match="there is no such folder"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-99"), tmp_path)


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("model.safetensors", 0, "model.safetensors is not whole"),
        ("model.safetensors", 200, "model.safetensors is not whole"),
        ("model.safetensors", None, "its weights are missing"),
        ("optimizer.pt", 0, "optimizer.pt is not whole"),
        ("optimizer.pt", 500, "optimizer.pt is not whole"),
    ],
)
def test_weights_and_state_that_are_cut_are_found_before_training(
    name: str, kept: int | None, message: str, tmp_path: Path
) -> None:
    whole, cut = checkpoint(tmp_path / "checkpoint-1"), checkpoint(tmp_path / "checkpoint-2")
    content = (cut / name).read_bytes()
    assert checkpoint_to_resume("auto", tmp_path) == cut
    (cut / name).unlink()
    if kept is not None:
        (cut / name).write_bytes(content[:kept])
    assert checkpoint_to_resume("auto", tmp_path) == whole
    with pytest.raises(SparseAttentionError, match=f"{message}.*; nearest: .*checkpoint-1"):
        checkpoint_to_resume(str(cut), tmp_path)


def test_ctrl_c_in_training_keeps_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPTS / "finetune.py"),
        *FLAGS,
        "--max_steps",
        "100000",
        "--output_dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "'loss'" in line:  # a step was made
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=120)
    told = "".join(said) + rest
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "--resume auto goes on" in told
    (kept,) = tmp_path.glob("checkpoint-*")
    step = json.loads((kept / "trainer_state.json").read_text())["global_step"]
    assert not (tmp_path / "config.json").exists()  # nothing that looks like the end of the training
    metrics = finetune.main([*FLAGS, "--max_steps", str(step + 1), "--resume", "auto", "--output_dir", str(tmp_path)])
    assert metrics["global_step"] == step + 1
    assert (tmp_path / "config.json").exists()


SAVED_UNDER_CTRL_C = """
import os, signal, sys, time
from sa_hf.hf.checkpoints import publish
from sa_hf.tasks.flags import run_script
from sa_hf.tasks.verify import load_saved
from sa_hf.tools import finetune
times, real = int(sys.argv.pop(1)), publish.publish
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
def publish_under_ctrl_c(stage, *rest):  # the files are written, and not in place yet
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # two signals at once are one
    return real(stage, *rest)
publish.publish = publish_under_ctrl_c
run_script(finetune.main)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_last_save(tmp_path: Path, times: int) -> None:
    command = [sys.executable, "-c", SAVED_UNDER_CTRL_C, str(times), *FLAGS, "--output_dir", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "finishing the save, then stopping; Ctrl-C again stops at once" in ended.stderr
    assert not list((tmp_path / "out").glob(".*"))  # the half of a save is gone
    last = ended.stderr.strip().splitlines()[-1]
    if times == 1:
        assert last.startswith(f"stopped; the trained model is whole in {tmp_path / 'out'}")
        assert load_saved(tmp_path / "out", "causal-lm").config.sa_hf
    else:
        assert last == "stopped by Ctrl-C"
        assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes")
def test_a_full_disk_has_a_clear_end_and_keeps_what_was_whole(tmp_path: Path) -> None:
    finetune.main([*FLAGS, "--save_steps", "1", "--max_steps", "1", "--output_dir", str(tmp_path)])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, str(SCRIPTS / "finetune.py"), *FLAGS, "--resume", "auto", "--save_steps", "1"]
    told = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], preexec_fn=small_disk, capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "SA_HF_CPU_KERNELS": "0"},
    )  # fmt: skip
    assert told.returncode == 1, told.stdout + told.stderr
    assert "Traceback" not in told.stderr
    # On Python 3.12 and newer a bar of progress stands before it in its line, and is drawn once more after it.
    last = told.stderr.rpartition("error: ")[2].splitlines()[0]
    assert last.startswith(f"{tmp_path} cannot be written")
    assert "checkpoint-1" in last
    assert {p: p.read_bytes() for p in before if p.exists()} == before
    assert checkpoint_to_resume("auto", tmp_path) == tmp_path / "checkpoint-1"


def test_only_what_cannot_be_written_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no checkpoint was kept"), writing(tmp_path / "a" / "b"):
        raise RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0")
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path):
        raise RuntimeError("shapes differ")
