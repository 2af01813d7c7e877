"""The scripts and the installed package run one code, and a user's mistake ends in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_cases import SCRIPTS

from sa_hf import SparseAttentionError
from sa_hf.tasks.verify import load_saved
from sa_hf.tools import cli, evaluate, finetune


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("finetune", ["--dataset", "nofile.csv"], "dataset 'nofile.csv' does not exist"),
        ("evaluate", ["--model", "./nowhere"], "'./nowhere' is no folder here"),
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


def never(*args: object, **options: object) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "nofile.csv"], "does not exist"),
        (["--task", "forecasting", "--dataset", "series"], "has no head"),
        (["--dataset", "short.txt", "--max_length", "64"], "max_length of at most"),
        (["--dataset", "labels.csv", "--task", "sequence-classification"], "at least 2 classes"),
        (["--set", "blok_size=16"], "block_size"),
        (["--report_to", "tensorbord"], "did you mean 'tensorboard'"),
        (["--dataset", "stdlb"], r"'stdlb' is no file or folder here \(did you mean 'stdlib'\?\)"),
        (["--dataset", "shrt.txt"], r"'shrt.txt' does not exist \(did you mean 'short.txt'\?\)"),
        (["--dataset", "short.txt", "--dataset_config", "x"], "dataset_config='x' is for hub.*not for the file"),
        (["--model", "tiny-brt"], r"did you mean 'tiny-bert'"),
        (["--report_to", "none,wandb"], "give none, all, or one of"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("one short text")
    Path("labels.csv").write_text("text,label\none,a\ntwo,a\n")
    monkeypatch.setattr(finetune, "load_for_task", never)
    with pytest.raises(SparseAttentionError, match=message):
        finetune.main(flags)


def test_evaluation_reads_its_data_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig

    BertConfig(architectures=["BertForSequenceClassification"], num_labels=3).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(evaluate, "load_saved", never)
    with pytest.raises(SparseAttentionError, match="does not exist"):
        evaluate.main(["--model", str(tmp_path / "model"), "--dataset", "nofile.csv"])
    (tmp_path / "rows.csv").write_text("text,label\none,a\ntwo,b\n")
    flags = ["--task", "sequence-classification", "--eval_split", "all", "--dataset", str(tmp_path / "rows.csv")]
    with pytest.raises(SparseAttentionError, match=r"label 'a' is no class of the model"):
        evaluate.main(["--model", str(tmp_path / "model"), *flags])


def test_lora_without_peft_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig

    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "base")
    adapter = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(finetune, "load_for_task", never)
    with pytest.raises(SparseAttentionError, match=r"--lora_rank needs PEFT: pip install 'peft>=0.18'"):
        finetune.main(["--lora_rank", "2"])
    with pytest.raises(SparseAttentionError, match="an adapter of LoRA, needs PEFT"):
        load_saved(tmp_path, "masked-lm")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model", "MODEL", "--max_length", "48"],
            "--max_length 48 is above the 32 positions of Bert",
        ),
        (["--model", "MODEL/config.json"], "config.json' is a file; a model is a folder"),
        (["--output", "/nowhere/figures.json"], "--output /nowhere/figures.json: /nowhere is no folder"),
    ],
)
def test_what_evaluation_cannot_do_is_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, ByT5Tokenizer

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=400, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path)
    ByT5Tokenizer(mask_token="<extra_id_0>").save_pretrained(tmp_path)
    given = [word.replace("MODEL", str(tmp_path)) for word in flags]
    with pytest.raises(SparseAttentionError, match=message):
        evaluate.main([*given, "--eval_rows", "2", "--cpu"])


def test_a_model_that_no_pattern_lengthens_takes_no_longer_rows(tmp_path: Path) -> None:
    flags = ["--pattern", "none", "--max_length", "1024", "--train_rows", "2", "--eval_rows", "1"]
    with pytest.raises(SparseAttentionError, match=r"above the 512 positions.*train with a --pattern"):
        finetune.main([*flags, "--output_dir", str(tmp_path)])
