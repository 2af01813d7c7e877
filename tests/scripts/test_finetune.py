"""``sa_hf.tools.finetune``: every pattern trains, saves and reloads; resuming, checkpointing, LoRA, data and flags."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from finetune_cases import CASES, DECODER, FEW_STEPS, SCRIPTS
from older_releases import OLDER
from safetensors.torch import load_file, save_file

from sa_hf import SparseAttentionError, available_patterns, patch_model
from sa_hf.tasks.flags import source_of
from sa_hf.tasks.made import MADE_NAMES
from sa_hf.tools import evaluate, finetune
from sa_hf.tools.options import parse_options


def run(output: Path, *flags: str) -> dict:
    return finetune.main([*FEW_STEPS, "--verify", "same", "--output_dir", str(output), *flags])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


SYSTEMS = sorted(set(available_patterns()) - {"dense", "sliding_window", "frozen_mask"})


@pytest.mark.parametrize("pattern", SYSTEMS)
def test_every_pattern_trains_saves_and_reloads(pattern: str, tmp_path: Path) -> None:
    metrics = run(tmp_path, "--pattern", pattern, *CASES.get(pattern, ()))
    assert metrics["reload_verified"]
    assert metrics["global_step"] == 2
    assert math.isfinite(metrics["eval_loss"])
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["eval_loss"] == metrics["eval_loss"]
    assert saved["arguments"]["pattern"] == pattern
    assert "- loss on stdlib: " in (tmp_path / "README.md").read_text()
    layers = json.loads((tmp_path / "config.json").read_text())["sa_hf"]["layers"]
    assert {entry["name"] for stack in layers.values() for entry in stack.values()} == {pattern}
    figures = {name for record in metrics["log"] for name in record if name.startswith("sparse/")}
    expected = {"sparsebert": "sparse/sparsebert_density", "expire_span": "sparse/expire_span"}
    assert pattern not in expected or expected[pattern] in figures


def test_the_cases_are_of_systems_that_there_are() -> None:
    assert set(CASES) <= set(SYSTEMS)


def test_masks_and_spans_learn_at_their_own_rate(tmp_path: Path) -> None:
    run(
        tmp_path,
        "--pattern",
        "expire_span",
        *CASES["expire_span"],
        "--sparse_lr",
        "0.5",
        "--lr",
        "0",
        "--weight_decay",
        "1",
    )
    trained = weights(tmp_path)
    spans = {n: x for n, x in trained.items() if ".sparse." in n and n.endswith("bias")}
    assert spans
    # Started at b = 4; Adam's first steps are about the rate.
    assert all((x - 4).abs().max() > 0.1 for x in spans.values())
    assert torch.equal(trained["model.norm.weight"], torch.ones(64))


def test_a_longer_input_lengthens_the_model_and_its_tokenizer(tmp_path: Path) -> None:
    """From a folder of 32 positions to 80, verified in a process of its own."""
    short = ["--model", "tiny-bert", "--task", "masked-lm", "--max_length", "32", "--pattern", "none"]
    run(tmp_path / "short", *short)
    flags = ["--pattern", "bigbird", "--set", "block_size=16", "--max_length", "80", "--task", "masked-lm"]
    metrics = run(tmp_path / "long", "--model", str(tmp_path / "short"), *flags, "--verify", "fresh")
    assert metrics["reload_verified"]
    assert json.loads((tmp_path / "long" / "config.json").read_text())["max_position_embeddings"] == 80
    assert json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())["model_max_length"] == 80


def test_a_checkpoint_that_is_not_what_was_trained_is_found_out(tmp_path: Path) -> None:
    from sa_hf.tasks.verify import load_saved, verify_reload

    run(tmp_path, "--pattern", "sliding_window", *DECODER)
    model = load_saved(tmp_path, "causal-lm")
    batch = {"input_ids": torch.arange(20)[None]}
    verify_reload(model, tmp_path, "causal-lm", batch, fresh=False)
    changed = weights(tmp_path)
    changed["model.norm.weight"][0] += 0.5
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparseAttentionError, match="differs from the one saved"):
        verify_reload(model, tmp_path, "causal-lm", batch, fresh=False)


def test_resuming_ends_where_an_uninterrupted_run_ends(tmp_path: Path) -> None:
    flags = ["--pattern", "sliding_window", "--set", "window=8", *DECODER, "--save_steps", "1", "--max_steps", "3"]
    run(tmp_path / "whole", *flags)
    run(tmp_path / "cut", *flags)
    resumed = run(tmp_path / "cut", *flags, "--resume", str(tmp_path / "cut" / "checkpoint-1"))
    assert resumed["global_step"] == 3
    # The record of the steps goes on behind the checkpoint's.
    assert [r["step"] for r in resumed["log"] if "loss" in r] == [1, 2, 3]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-6)


def test_resume_auto_starts_afresh_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert run(tmp_path, "--pattern", "sliding_window", *DECODER, "--resume", "auto")["global_step"] == 2


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    flags = ["--pattern", "expire_span", *CASES["expire_span"]]
    plain = run(tmp_path / "plain", *flags)
    checkpointed = run(tmp_path / "checkpointed", *flags, "--gradient_checkpointing")
    norms = [[r["grad_norm"] for r in metrics["log"] if "grad_norm" in r] for metrics in (plain, checkpointed)]
    assert len(norms[0]) == 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "checkpointed")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    if OLDER:
        pytest.skip(
            f"transformers {transformers.__version__}: a Trainer may divide accumulated losses twice (tests/hf)"
        )
    flags = ["--model", "tiny-bert", "--task", "sequence-classification", "--dataset", "stdlib-short"]
    flags += ["--max_length", "48", "--pattern", "sliding_window", "--model_set", "hidden_dropout_prob=0"]
    flags += ["--model_set", "attention_probs_dropout_prob=0", "--max_steps", "1"]
    whole = run(tmp_path / "whole", *flags, "--batch_size", "4")
    cut = run(tmp_path / "cut", *flags, "--batch_size", "1", "--gradient_accumulation", "4")
    for figure in ("loss", "grad_norm"):
        assert cut["log"][0][figure] == pytest.approx(whole["log"][0][figure], rel=1e-4)


def test_lora_trains_the_sparse_state_along(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--pattern", "expire_span", *CASES["expire_span"], "--lora_rank", "2")
    assert metrics["reload_verified"]
    assert not (tmp_path / "model.safetensors").exists()
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert any("lora_A" in name for name in names)
    assert any(".sparse." in name for name in names)
    assert "sa_hf" in json.loads((tmp_path / "base" / "config.json").read_text())


def test_forecasting_with_logsparse(tmp_path: Path) -> None:
    flags = ["--model", "convtrans", "--task", "forecasting", "--dataset", "series", "--max_length", "32"]
    metrics = run(tmp_path, *flags, "--pattern", "logsparse", "--set", "conv_kernel_size=2", "--set", "local_window=4")
    assert metrics["reload_verified"]
    assert 0 < metrics["R_0.5"] < 10
    attention = json.loads((tmp_path / "config.json").read_text())["attention"]
    assert (attention["name"], attention["local_window"]) == ("logsparse", 4)
    evaluated = evaluate.main(["--model", str(tmp_path), *flags[2:], "--eval_rows", "2"])
    assert evaluated["R_0.9"] == pytest.approx(metrics["R_0.9"], rel=0.5)
    with pytest.raises(SparseAttentionError, match=r"not 'forecasting'.*piecewise.*series"):
        run(tmp_path, *flags, "--dataset", "stdlib")


def test_bf16_trains_and_reloads(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--pattern", "bigbird", "--set", "block_size=16", *DECODER, "--bf16")
    assert metrics["reload_verified"]
    assert all(x.dtype == torch.float32 for x in weights(tmp_path).values() if x.is_floating_point())


def test_yaml_holds_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("pattern: bigbird\nset: {block_size: 16, num_random_blocks: 2}\nmax_length: 64\ntask: causal-lm\n")
    args = finetune.parse_arguments(["--config", str(path), "--max_length", "32", "--set", "num_random_blocks=1"])
    assert (args.max_length, args.task) == (32, "causal-lm")
    config = finetune.chosen_pattern(args)
    assert (config.name, config.block_size, config.num_random_blocks) == ("bigbird", 16, 1)


def test_a_yaml_may_hold_a_pattern_by_layers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("pattern: {'0': dense, '1': {name: sliding_window, window: 8}}\n")
    run(tmp_path / "out", "--config", str(path), *DECODER)
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["sa_hf"]["layers"]["decoder"]
    assert {index: entry.get("window") for index, entry in layers.items()} == {"1": 8}


def test_a_flag_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("max_lenght: 64\n")
    with pytest.raises(SparseAttentionError, match=r"max_lenght.*did you mean 'max_length'"):
        finetune.parse_arguments(["--config", str(path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pattern", "bigbrid"], "did you mean 'bigbird'"),
        (["--set", "block_size=48"], "block_size=48"),
        (["--set", "block_size"], "must have the form"),
        (["--task", "causal-lm", "--dataset", "summation"], "sequence-classification"),
        (["--task", "causal-lm", "--dataset", "corridor", "--model", "minilm"], "token ids of its own"),
        (["--model_set", "no_such_field=1"], "no_such_field"),
        (["--task", "causal-lm"], "bidirectional.*nearest: --task masked-lm"),
        (["--task", "masked-lm", "--model", "tiny-gpt2"], "nearest: --task causal-lm"),
        (["--train_rows", "0"], "train_rows.*0 must be at least 1"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_bad_flags_stop_before_training(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        run(tmp_path, "--model", "tiny-bert", "--max_length", "64", *flags)
    assert not (tmp_path / "config.json").exists()


def test_a_bert_made_a_decoder_is_a_causal_language_model(tmp_path: Path) -> None:
    flags = ["--model", "tiny-bert", "--task", "causal-lm", "--max_length", "32", "--model_set", "is_decoder=true"]
    assert run(tmp_path, *flags, "--pattern", "sliding_window")["reload_verified"]
    with pytest.raises(SparseAttentionError, match="pass --trust_remote_code"):
        run(tmp_path / "again", *flags, "--model", str(tmp_path))


@pytest.mark.parametrize("path", sorted((SCRIPTS / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    args = finetune.parse_arguments(["--config", str(path)])
    pattern = finetune.chosen_pattern(args)
    named = pattern.values() if isinstance(pattern, dict) else [pattern]
    names = {"mixture", "lra_text", args.dataset.replace("-", "_")}
    assert path.stem in {*names, *(getattr(config, "name", config) for config in named)}
    data = {"train_rows": 2, "eval_rows": 2}
    if args.dataset in MADE_NAMES:
        # The data set takes the fields that the file sets, and serves its task.
        source_of(argparse.Namespace(**{**vars(args), **data}), fields=parse_options(args.dataset_set))
    assert args.output_dir == f"runs/{path.stem}"


def test_a_lora_classifier_loads_through_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    flags = ["--model", "tiny-bert", "--task", "sequence-classification", "--dataset", "stdlib-short"]
    flags += ["--max_length", "48", "--pattern", "sliding_window", "--max_steps", "1", "--lora_rank", "2"]
    monkeypatch.chdir(tmp_path)
    metrics = run(Path("run"), *flags)
    assert metrics["reload_verified"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "run" / "base")
    monkeypatch.chdir("/")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert loaded.get_base_model().sa_hf_patch


def test_a_head_that_was_not_saved_is_not_measured(tmp_path: Path) -> None:
    from sa_hf.tasks.verify import load_saved

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32, **sizes))
    for folder in ("dense", "sparse"):
        model.save_pretrained(tmp_path / folder)
        with pytest.raises(
            SparseAttentionError, match=r"holds no 'cls.*--task masked-lm.*BertForSequenceClassification"
        ):
            load_saved(tmp_path / folder, "masked-lm")
        assert load_saved(tmp_path / folder, "sequence-classification").num_labels == 2
        model = patch_model(model, "star")
