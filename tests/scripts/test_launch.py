"""What needs processes of its own: two ranks by ``accelerate launch``, the evaluation script, the quickstart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_cases import DECODER, FEW_STEPS, SCRIPTS
from safetensors.torch import load_file

from sa_hf.tasks.metrics import wilson
from sa_hf.tools import evaluate, finetune

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def call(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    """One row on each of two ranks is a batch of two rows in one process: the same gradients, so the same weights.

    There are two rows in all, so the order in which they come does not matter.
    """
    flags = [
        "--pattern",
        "sliding_window",
        "--set",
        "window=8",
        *DECODER,
        *FEW_STEPS,
        "--lr",
        "1e-3",
        "--train_rows",
        "2",
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(SCRIPTS / "accelerate" / "ddp_cpu.yaml"), str(SCRIPTS / "finetune.py")]
    shown = call(*launch, *flags, "--batch_size", "1", "--output_dir", str(tmp_path / "two"))
    # Two ranks print what one prints: the summary, and the metrics.
    assert shown.count('"global_step": 2') == 1
    assert shown.count("LlamaForCausalLM at 64 tokens") == 1
    finetune.main([*flags, "--batch_size", "2", "--output_dir", str(tmp_path / "one"), "--verify", "same"])
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert all(m["reload_verified"] and m["global_step"] == 2 for m in metrics)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_evaluation_of_the_saved_model_repeats_the_training_scripts_figure(tmp_path: Path) -> None:
    flags = ["--pattern", "sliding_window", "--set", "window=4", *DECODER, *FEW_STEPS]
    trained = finetune.main([*flags, "--output_dir", str(tmp_path), "--verify", "same"])
    data = ["--model", str(tmp_path), "--task", "causal-lm", "--max_length", "64", "--eval_rows", "2"]
    sparse = evaluate.main([*data, "--output", str(tmp_path / "figures.json")])
    dense = evaluate.main([*data, "--attention", "dense"])
    assert sparse["loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    assert sparse["loss"] != pytest.approx(dense["loss"], rel=1e-6)
    assert 0 <= sparse["accuracy"] <= 1
    assert json.loads((tmp_path / "figures.json").read_text())["loss"] == sparse["loss"]


def test_the_quickstart_runs_at_toy_size(tmp_path: Path) -> None:
    shown = call(sys.executable, str(SCRIPTS / "quickstart.py"), "--quick", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == ["dense at 32", "dense at 256", "sparse (BigBird) at 256"]
    assert results["rows"]["sparse (BigBird) at 256"]["reload_verified"]
    for row in results["rows"].values():
        assert row["train_peak_memory_mb"] > 100
        assert row["step_seconds"] > 0
        assert (row["eval_accuracy_low"], row["eval_accuracy_high"]) == wilson(round(2 * row["eval_accuracy"]), 2)
    table = (tmp_path / "results.md").read_text()
    assert table in shown
    for picture in ("pattern.png", "result.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
