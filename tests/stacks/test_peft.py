"""PEFT's adapters on patched models, through the stock Trainer and PEFT's own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from hf_cases import tiny_model, tokens
from used_inside import checks

import sa_hf

pytestmark = pytest.mark.filterwarnings("ignore")
EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1)


def lora(model: Any, **options: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, sa_hf.prepare_peft(config, model))


def trained(model: Any, folder: Path) -> Any:
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(4, 24)]
    arguments = tf.TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tf.Trainer(model=model, args=arguments, train_dataset=rows).train()
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(1, 24, seed=5)).logits


@checks("peft", "LoRA under the stock Trainer: adapters and spans train, the base does not")
def test_what_trains(tmp_path: Path) -> None:
    model = lora(sa_hf.patch_model(tiny_model("llama"), EXPIRING))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, tmp_path)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".lora_B." in name for name in changed)
    assert any(".sparse." in name for name in changed)
    assert all(".lora_" in name or ".modules_to_save." in name for name in changed)


@checks("peft", "a trained adapter loads by AutoPeftModelForCausalLM as it was, and raises on a dense base")
def test_loads_as_trained(tmp_path: Path) -> None:
    base = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    base.save_pretrained(tmp_path / "base")
    model = trained(lora(base), tmp_path / "runs")
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")


@checks("peft", "merge_and_unload gives the adapted model's outputs, still sparse, and loads again")
def test_merged(tmp_path: Path) -> None:
    model = trained(lora(sa_hf.patch_model(tiny_model("llama"), EXPIRING)), tmp_path / "runs")
    expected = logits(model)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    assert torch.equal(logits(loaded), logits(merged))
    with sa_hf.dense(loaded):
        assert not torch.allclose(logits(loaded), expected, atol=1e-2)
