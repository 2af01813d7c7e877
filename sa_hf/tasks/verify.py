"""Proof that a saved model loads as what was trained: the same outputs, bit for bit, in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.loaded import sorted_names
from sa_hf.tasks.load import adapter_fields, read_config
from sa_hf.tasks.models import auto_class_of, check_head

# What a launcher sets for its ranks; the verifying process is alone.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")

DECODED = 8  # tokens that a decoder is compared on


def outputs_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits of a model in evaluation mode, on the CPU, of whatever shape its head gives; of a head for questions,
    those of starts and ends. The decoder of a model that has an encoder reads the first tokens of its input."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    inputs = {name: x.to(device) for name, x in batch.items()}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :DECODED]
    with torch.no_grad():
        output = model(**inputs)
    model.train(was_training)
    logits: Tensor = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])
    return logits.float().cpu()


def verify_reload(model: Any, folder: str | Path, task: str, batch: dict[str, Tensor], *, fresh: bool = True) -> None:
    """Load ``folder`` through the task's Auto class with ``trust_remote_code=True`` and compare with ``model``.

    Args:
        model: what was saved.
        batch: inputs without labels; a few rows are enough.
        fresh: load in a new Python process, as a user would; else in this one.

    Raises:
        SparseAttentionError: the loaded model gives other outputs, or does not load.
    """
    expected = outputs_of(model, batch)
    device = str(next(model.parameters()).device)
    if not fresh:
        compare(folder, task, batch, expected, device)
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "expected.safetensors")
        inputs = {f"input.{name}": x.cpu().contiguous() for name, x in batch.items()}
        save_file({**inputs, "expected": expected.contiguous()}, path)
        # The same number of threads: sums over another number of them differ in the last bit.
        environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        command = [sys.executable, "-m", "sa_hf.tasks.verify", str(folder), task, path, device]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SparseAttentionError(
            f"the saved model in {folder} could not be verified: {result.stderr.strip()[-2000:]}"
        )


def saved_config(folder: str | Path, task: str) -> Any:
    """The config of a saved model, of an adapter that of its base.

    Raises:
        SparseAttentionError: there is no such model, or it has no head for the task.
    """
    config = read_config(_base_of(folder) or str(folder), trust_remote_code=True)
    check_head(config, task)
    return config


def required_peft(what: str) -> Any:
    """The module ``peft``; raises ``SparseAttentionError`` where it is not installed, saying ``what`` needs it."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise SparseAttentionError(
            f"{what} needs PEFT: pip install 'peft>=0.18', or pip install '.[peft]' in a clone of sa_hf"
        ) from error


def load_saved(folder: str | Path, task: str) -> Any:
    """A saved model through the task's Auto class; a folder with an adapter is loaded with its patched base.

    Raises:
        SparseAttentionError: it was saved with another head, so that the task's would be a random one.
    """
    config = saved_config(folder, task)
    base, auto = _base_of(folder), auto_class_of(task)
    if base is not None:  # an adapter may bring the head
        peft = required_peft(f"{folder}, an adapter of LoRA,")
        return peft.PeftModel.from_pretrained(auto.from_pretrained(base, trust_remote_code=True), str(folder))
    model, found = auto.from_pretrained(str(folder), trust_remote_code=True, output_loading_info=True)
    missing = sorted_names(found["missing_keys"])
    if missing:
        raise SparseAttentionError(
            f"{folder} holds no {missing[0]!r} ({len(missing)} missing), which --task {task} ({auto.__name__}) needs: "
            f"it would be measured with random weights. It was saved as {config.architectures}; name the task that it "
            "was trained on, or train it for this one"
        )
    return model


def _base_of(folder: str | Path) -> str | None:
    """What the adapter in a folder names as its base; None where there is no adapter."""
    base: str | None = adapter_fields(Path(folder)).get("base_model_name_or_path")
    return base


def compare(folder: str | Path, task: str, batch: dict[str, Tensor], expected: Tensor, device: str) -> None:
    """Raise ``SparseAttentionError`` where the model in ``folder`` does not give ``expected``, bit for bit."""
    found = outputs_of(load_saved(folder, task).to(device), batch)
    if found.shape != expected.shape or not torch.equal(found, expected):
        difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("nan")
        raise SparseAttentionError(
            f"the model loaded from {folder} differs from the one saved: largest difference {difference:.3e}, "
            f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
        )


def main(folder: str, task: str, path: str, device: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(path)
    expected = tensors.pop("expected")
    compare(folder, task, {name.removeprefix("input."): x for name, x in tensors.items()}, expected, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
