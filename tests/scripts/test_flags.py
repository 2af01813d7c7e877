"""Flags and the YAML file under them are checked alike; a checkpoint of another run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetune_cases import DECODER, FEW_STEPS
from safetensors.torch import save_file

from sa_hf import SparseAttentionError
from sa_hf.tools import evaluate, finetune

BIGBIRD = ["--pattern", "bigbird", "--set", "block_size=16", *DECODER]


def parsed(tmp_path: Path, text: str, *flags: str) -> dict[str, object]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return vars(finetune.parse_arguments(["--config", str(path), *flags]))


HUGGING_FACE = {
    "model_name_or_path": ("model", "tiny-bert"),
    "dataset_name": ("dataset", "stdlib"),
    "max_seq_length": ("max_length", 96),
    "max_train_samples": ("train_rows", 5),
    "max_eval_samples": ("eval_rows", 6),
    "num_train_epochs": ("epochs", 2.5),
    "per_device_train_batch_size": ("batch_size", 3),
    "per_device_eval_batch_size": ("eval_batch_size", 4),
    "gradient_accumulation_steps": ("gradient_accumulation", 2),
    "learning_rate": ("lr", 3e-4),
    "lr_scheduler_type": ("scheduler", "cosine"),
    "resume_from_checkpoint": ("resume", "auto"),
    "warmup_ratio": ("warmup_steps", 0.2),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_names_are_taken_in_the_file_and_as_flags(name: str, tmp_path: Path) -> None:
    flag, value = HUGGING_FACE[name]
    assert parsed(tmp_path, f"{name}: {value}\n")[flag] == value
    assert parsed(tmp_path, f"{name.replace('_', '-')}: {value}\n")[flag] == value
    for written in (name, name.replace("_", "-")):
        assert getattr(finetune.parse_arguments([f"--{written}", str(value)]), flag) == value
        assert getattr(finetune.parse_arguments([f"--{written}={value}"]), flag) == value


def test_values_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    found = parsed(tmp_path, "lr: 1e-4\nmax_length: '64'\neval_steps: null\nbf16: true\n")
    assert (found["lr"], found["max_length"], found["eval_steps"], found["bf16"]) == (1e-4, 64, None, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_length: long\n", "max_length='long': invalid integer value"),
        ("max_length: 64.5\n", "max_length=64.5: invalid integer value"),
        ("max_length: true\n", "max_length=True must be one text or number"),
        ("max_length: [64]\n", r"max_length=\[64\] must be one text or number"),
        ("batch_size: 0\n", "batch_size=0: 0 must be at least 1; nearest: 1"),
        ("learning_rate: .nan\n", "learning_rate=nan: nan must be finite"),
        ("epochs: 0\n", "epochs=0: 0.0 must be finite and above 0"),
        ("task: masked-ml\n", "task='masked-ml': invalid choice.*did you mean 'masked-lm'"),
        ("scheduler: cosinus\n", "did you mean 'cosine'"),
        ("bf16: 'yes it is'\n", "bf16='yes it is' must be true or false"),
        ("set: block_size\n", "set must be a mapping of fields"),
        ("set: [1]\n", "set must be a mapping of fields"),
        ("model: {a: 1}\n", "model=.* must be one text or number"),
        ("per_device_batch_size: 2\n", "unknown flag 'per_device_batch_size'.*did you mean 'per_device_"),
        ("5: 2\n", "unknown flag 5"),
        ("batch_size: 2\nper_device_train_batch_size: 4\n", "batch_size and per_device_train_batch_size are one flag"),
        ("- a\n", "must hold a mapping"),
        ("a: [\n", "must be a readable YAML file"),
    ],
)
def test_a_bad_value_in_the_file_is_refused_as_a_flags_is(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparseAttentionError, match=message) as raised:
        parsed(tmp_path, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("main", [finetune.main, evaluate.main])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "many"], "--batch_size.*invalid integer value: 'many'"),
        (["--batch_size", "0"], "--batch_size.*0 must be at least 1; nearest: 1"),
        (["--seed", "-1"], "--seed.*-1 must be at least 0"),
        (["--datasets", "x"], "unknown flag --datasets.*did you mean '--dataset'"),
        (["--task", "nothing"], "--task: invalid choice: 'nothing'"),
    ],
)
def test_a_bad_flag_is_one_line(main: object, flags: list[str], message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message) as raised:
        main(flags)
    assert "\n" not in str(raised.value)


def run(output: Path, *flags: str) -> dict:
    return finetune.main([*FEW_STEPS, *flags, "--verify", "none", "--output_dir", str(output)])


def test_a_checkpoint_of_another_run_is_refused_before_training(tmp_path: Path) -> None:
    run(tmp_path, *BIGBIRD, "--save_steps", "1")
    checkpoint = tmp_path / "checkpoint-1"
    metrics = (tmp_path / "metrics.json").read_bytes()
    cases = [
        (["--set", "num_random_blocks=1"], "another pattern: bigbird with num_random_blocks=3 in decoder layer 0, not"),
        (["--pattern", "star"], "another pattern: 'bigbird' in decoder layer 0, not 'star'"),
        (["--pattern", "none"], "another pattern: 'bigbird' in decoder layer 0, not dense"),
        (["--layers", "0"], "another pattern: 'bigbird' in decoder layer 1, not dense"),
        (["--model_set", "num_hidden_layers=1"], "num_hidden_layers=2, not 1"),
        (["--lora_rank", "2"], "--lora_rank 0, not 2"),
        (["--task", "sequence-classification", "--dataset", "stdlib-short"], r"architectures=.*CausalLM'\], not .*Seq"),
    ]
    for flags, message in cases:
        given = BIGBIRD if flags[0] != "--pattern" else DECODER
        with pytest.raises(SparseAttentionError, match=message):
            run(tmp_path, *given, *flags, "--resume", str(checkpoint))
    assert (tmp_path / "metrics.json").read_bytes() == metrics
    assert run(tmp_path, *BIGBIRD, "--resume", str(checkpoint))["global_step"] == 2


def test_a_run_at_its_end_makes_no_step_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *BIGBIRD, "--save_steps", "2")
    trained = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    assert run(tmp_path, *BIGBIRD, "--save_steps", "2", "--resume", "auto")["global_step"] == 2
    assert (tmp_path / "model.safetensors").read_bytes() == trained
    assert "checkpoint-2 is at step 2 of --max_steps 2: no step is left" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint-3").exists()


def test_a_dense_model_does_not_keep_the_card_of_the_sparse_one(tmp_path: Path) -> None:
    run(tmp_path, *BIGBIRD)
    assert "bigbird" in (tmp_path / "README.md").read_text()
    run(tmp_path, *DECODER, "--pattern", "none")
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pattern", "none", "--set", "window=3"], "--set.*but --pattern none leaves the model"),
        (["--max_steps", "0"], "--max_steps: 0 must be at least 1; nearest: 1"),
        (["--max_steps", "-5"], "--max_steps: -5 must be at least 1; nearest: 1"),
        (["--rope_parameters", "{"], "--rope_parameters: '{' is no JSON"),
        (["--model_set", "hidden_size=wide"], "--model_set hidden_size='wide': .*expected int, got str"),
        (["--model_set", "hidden_size=10"], "no model is made with --model_set hidden_size=10: .*not a multiple"),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x: /dev/null is no folder; nearest: /dev"),
    ],
)
def test_what_cannot_be_is_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    model = ["--model", "tiny-bert", "--max_length", "64"]
    given = [*FEW_STEPS, *model, "--output_dir", str(tmp_path / "out"), *flags]
    with pytest.raises(SparseAttentionError, match=message) as raised:
        finetune.main(given)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_switches_take_a_value_as_in_transformers_scripts() -> None:
    def bf16(*words: str) -> bool:
        return bool(finetune.parse_arguments(list(words)).bf16)

    assert bf16("--bf16", "--pattern", "star")
    assert bf16("--bf16", "true")
    assert bf16("--bf16=True")
    assert not bf16("--bf16", "False", "--pattern", "star")
    assert not bf16("--bf16=false")
    assert finetune.parse_arguments(["--lora_r", "4", "--max_steps", "-1"]).lora_rank == 4
    with pytest.raises(SparseAttentionError, match="unknown flag perhaps"):
        bf16("--bf16", "perhaps")


def test_a_checkpoint_of_an_adapter_goes_on_with_its_own_rank_and_pattern(tmp_path: Path) -> None:
    flags = [*DECODER, "--lora_rank", "2", "--save_steps", "1"]
    run(tmp_path, *BIGBIRD, *flags)
    resume = ["--resume", str(tmp_path / "checkpoint-1")]
    with pytest.raises(SparseAttentionError, match="--lora_rank 2, not 3"):
        run(tmp_path, *BIGBIRD, *flags, "--lora_rank", "3", *resume)
    with pytest.raises(SparseAttentionError, match="another pattern: 'bigbird'"):
        run(tmp_path, "--pattern", "longnet", *flags, *resume)
    assert run(tmp_path, *BIGBIRD, *flags, *resume)["global_step"] == 2


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SparseAttentionError, match="nowhere: there is no such folder"):
        run(tmp_path, *BIGBIRD, "--resume", str(tmp_path / "nowhere"))
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    for name in ("config.json", "trainer_state.json"):
        (checkpoint / name).write_text("{}")
    save_file({"weight": torch.ones(1)}, checkpoint / "model.safetensors")
    with pytest.raises(SparseAttentionError, match=r"it holds no model.*nearest: .*checkpoint-3"):
        run(tmp_path, *BIGBIRD, "--resume", str(tmp_path))
    assert list(tmp_path.iterdir()) == [checkpoint]
    (checkpoint / "config.json").unlink()
    with pytest.raises(SparseAttentionError, match=r"checkpoint-3: it holds no model.*nearest: none"):
        run(tmp_path, *BIGBIRD, "--resume", str(checkpoint))
