"""Each task through the scripts: trained, saved, reloaded bit for bit, and evaluated with intervals."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_cases import FEW_STEPS
from older_releases import REFUSED_THERE, older_releases_may

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import load_source
from sa_hf.tools import evaluate, finetune

LLAMA, BERT = ["--model", "tiny-llama"], ["--model", "tiny-bert"]
WINDOW = ["--pattern", "sliding_window", "--set", "window=8"]
RETRIEVAL = [*LLAMA, "--task", "causal-lm", "--dataset_set", "wording=short", "--max_length", "320"]
TWO = ["--dataset_set", "needles=2"]
TASKS: dict[str, tuple[list[str], str | None]] = {
    "retrieval-single": ([*RETRIEVAL, "--dataset", "retrieval-single"], None),
    "retrieval-multi-key": ([*RETRIEVAL, "--dataset", "retrieval-multi-key", *TWO], None),
    "retrieval-multi-value": ([*RETRIEVAL, "--dataset", "retrieval-multi-value", *TWO], None),
    "retrieval-variables": (
        [*RETRIEVAL, "--dataset", "retrieval-variables", *TWO, "--dataset_set", "haystack=noise"],
        None,
    ),
    "listops": ([*BERT, "--task", "sequence-classification", "--dataset", "listops", "--max_length", "64"], None),
    "questions": (
        ["--model", "minilm", "--task", "question-answering", "--dataset", "stdlib-questions", "--max_length", "128",
         "--dataset_set", "entries=2"],
        "f1",
    ),
    "summaries": (
        ["--model", "tiny-t5", "--task", "summarization", "--dataset", "stdlib-summaries", "--max_length", "64"],
        "rouge_l",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_task_goes_all_the_way(name: str, tmp_path: Path) -> None:
    flags, figure = TASKS[name]
    with older_releases_may(REFUSED_THERE):  # T5
        metrics = finetune.main([*FEW_STEPS, *flags, *WINDOW, "--verify", "same", "--output_dir", str(tmp_path)])
    assert metrics["reload_verified"]
    found = evaluate.main(["--model", str(tmp_path), *flags[2:], "--eval_rows", "2", "--cpu", "--batch_size", "2"])
    assert found["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert found["interval"].endswith("Wilson" if name in ("listops", "questions") else "bootstrap over rows")
    if figure is not None:
        assert 0 <= found[figure] <= 1
    if figure == "rouge_l":
        assert found["rouge_l"] == metrics["rouge_l"]


def test_only_the_encoder_need_be_sparse(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("pattern: {encoder: {name: bigbird, block_size: 16}}\n")
    flags, _ = TASKS["summaries"]
    config, out = str(tmp_path / "run.yaml"), str(tmp_path / "out")
    with older_releases_may(REFUSED_THERE):
        metrics = finetune.main([*FEW_STEPS, *flags, "--config", config, "--verify", "same", "--output_dir", out])
    assert metrics["reload_verified"]
    assert '"encoder"' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("task", "dataset", "fields", "message"),
    [
        ("causal-lm", "retrieval-single", {"neddles": 3}, "did you mean 'needles'.*haystack"),
        (
            "causal-lm",
            "retrieval-single",
            {"haystack": "essays"},
            "'essays' must be 'stdlib', 'noise', or a file",
        ),
        ("causal-lm", "stdlib", {"size": 3}, "it has none at all"),
        ("causal-lm", "own.txt", {"size": 3}, "none of the data sets that are made"),
        ("masked-lm", "listops", {}, "use --task sequence-classification"),
    ],
)
def test_fields_of_data_sets_are_checked(task: str, dataset: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        load_source(task, dataset, max_length=64, fields=fields)
