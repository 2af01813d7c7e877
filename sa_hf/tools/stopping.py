"""Training that is cut short: by Ctrl-C, by a disk that is full, or in the middle of a save."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from sa_hf.errors import SparseAttentionError

STOPPED = 130  # the exit code of a program that Ctrl-C ended
STATE = "trainer_state.json"  # the last file that Trainer writes of a checkpoint
# torch.save says it in a plain RuntimeError.
TORCH_FILES = ("*.pt", "*.pth", "*.bin")  # of torch.save, archives of the kind of zip
TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed", "unexpected pos")


TRAINING = "stopping after this step, with a checkpoint"
SAVING = "finishing the save, then stopping"


class StopAndSave(TrainerCallback):
    """The first Ctrl-C ends training after the step at hand, with a checkpoint, or after the save that is being
    written; a second one ends it where it stands.

    In one process alone: ranks would hear of it at different steps and wait for each other.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, world_size: int, told: str = TRAINING) -> Iterator[StopAndSave]:
        """While inside, Ctrl-C asks for the end, and ``told`` is said."""
        if world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, before)
            print(f"{told}; Ctrl-C again stops at once", file=sys.stderr)

        signal.signal(signal.SIGINT, ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


class AtItsEnd(Exception):
    """The checkpoint that a run goes on from has all the steps of the run."""


class NoStepTooMany(TrainerCallback):
    """Raises :class:`AtItsEnd` where there is no step left of ``max_steps``: a Trainer would make one more.

    Weights and state of the checkpoint are loaded by then.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if 0 < args.max_steps <= state.global_step:
            raise AtItsEnd


def end_if_stopped(stop: StopAndSave, output: Path, step: int) -> None:
    """Raise ``SystemExit`` where Ctrl-C was pressed, and say how to go on."""
    if stop.asked:
        kept = output / f"checkpoint-{step}"
        print(f"stopped at step {step}, kept in {kept}; the same command with --resume auto goes on", file=sys.stderr)
        raise SystemExit(STOPPED)


def end_if_saved(stop: StopAndSave, output: Path) -> None:
    """Raise ``SystemExit`` where Ctrl-C was pressed during the last save, and say what is there."""
    if stop.asked:
        print(f"stopped; the trained model is whole in {output}, neither evaluated nor loaded again", file=sys.stderr)
        raise SystemExit(STOPPED)


def checkpoint_to_resume(wanted: str | None, output: Path) -> Path | None:
    """The checkpoint that ``--resume`` names: a folder, or with "auto" the newest whole one in ``output``.

    Raises:
        SparseAttentionError: the folder holds a checkpoint whose saving was cut short, or none.
    """
    if wanted is None:
        return None
    if wanted != "auto":
        reason = _cut_short(Path(wanted))
        if reason:
            places = (Path(wanted), Path(wanted).parent, output)
            whole = (folder for place in places for folder in _checkpoints(place) if not _cut_short(folder))
            raise SparseAttentionError(
                f"--resume {wanted}: {reason}; nearest: {next(whole, 'none, leave --resume out')}"
            )
        return Path(wanted)
    for folder in _checkpoints(output):
        reason = _cut_short(folder)
        if not reason:
            return folder
        print(f"{folder} is passed over: {reason}", file=sys.stderr)
    return None


def _checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in output.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def _cut_short(folder: Path) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "it holds no model (its saving was cut short, or it is no checkpoint)"
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE}, which is written last: its saving was cut short, or it is a model and no checkpoint"
    except ValueError:
        return f"its {STATE} is cut short"
    return _cut_weights(folder)


def _cut_weights(folder: Path) -> str | None:
    """What of a checkpoint's tensors is missing or not whole; sharded ones lie in folders of their own."""
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # reads the header, which says how long the file must be
                pass
        except (OSError, SafetensorError) as error:
            return f"its {path.name} is not whole ({error})"
    written = [path for pattern in TORCH_FILES for path in sorted(folder.glob(pattern))]
    for path in written:
        if not zipfile.is_zipfile(path):  # the list of what is in it stands at its end
            return f"its {path.name} is not whole"
    there = weights or any("model" in path.name for path in written) or any(p.is_dir() for p in folder.iterdir())
    return None if there else "its weights are missing"


def check_output(output: Path) -> None:
    """Raise ``SparseAttentionError`` where a run could not write into the folder; makes nothing."""
    there = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    if not there.is_dir():
        raise SparseAttentionError(f"--output_dir {output}: {there} is no folder; nearest: {there.parent}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SparseAttentionError(f"--output_dir {output}: {there} cannot be written by this user")


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """What goes wrong as files are written ends as one ``OSError`` that says where, how much is free, what remains."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        plain = isinstance(error, RuntimeError) and not isinstance(error, OSError)
        if plain and not any(words in str(error) for words in TORCH_CANNOT_WRITE):
            raise
        whole = [str(folder) for folder in _checkpoints(output) if not _cut_short(folder)]
        kept = f"whole, and to go on from with --resume auto: {whole[0]}" if whole else "no checkpoint was kept"
        there = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free / 2**30
        first = str(error).partition("\n")[0]
        raise OSError(f"{output} cannot be written ({first}; {free:.1f} GB free); {kept}") from error
