"""trl's own trainers on patched models."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from used_inside import checks

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parent.parent / "hf"))
from hf_cases import tiny_model, tokens  # noqa: E402
from words import word_tokenizer  # noqa: E402

import sa_hf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
MASKS = sa_hf.SparseBertAttentionConfig(mask_length=64, density_coef=20.0)
EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1)
STATIC = sa_hf.BigBirdAttentionConfig(block_size=4, num_random_blocks=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(eos_token="</s>", model_max_length=64)


def rows(lengths: tuple[int, ...]) -> Any:
    return datasets.Dataset.from_list([{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in lengths])


def sft(model: Any, tokenizer: Any, data: Any, folder: Any, *callbacks: Any, cls: Any = None, **options: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 1, "max_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "max_length": 48,
        "disable_tqdm": True, "gradient_checkpointing": False, **options,
    }  # fmt: skip
    return (cls or trl.SFTTrainer)(
        model=model, args=trl.SFTConfig(str(folder), **settings), train_dataset=data, processing_class=tokenizer,
        callbacks=list(callbacks),
    )  # fmt: skip


class Look(tf.TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@checks("trl", "SFTTrainer: the density of a SparseBERT mask falls")
def test_density_falls_under_the_fused_head(tokenizer: Any, tmp_path: Any) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), MASKS)
    logits = model.model.layers[0].self_attn.sparse.logits
    before = logits.detach().clone()
    sft(model, tokenizer, rows((24,) * 4), tmp_path, max_steps=6, learning_rate=0.5, optim="sgd").train()
    assert (logits[:, :24] < before[:, :24]).float().mean() > 0.95


@pytest.mark.parametrize("pattern", [MASKS, EXPIRING], ids=lambda c: c.name)
@pytest.mark.parametrize("checkpointed", [False, True])
@checks("trl", "SFTTrainer: gradients of one accumulated step equal the stock Trainer's, auxiliary losses included")
def test_one_accumulated_step_equals_the_stock_trainers(
    tokenizer: Any, tmp_path: Any, pattern: Any, checkpointed: bool
) -> None:
    data = rows((24, 17, 9, 30))
    labelled = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data]
    more = {"gradient_accumulation_steps": 4, "gradient_checkpointing": checkpointed}
    looks = Look(), Look()
    sft(sa_hf.patch_model(tiny_model("llama"), pattern), tokenizer, data, tmp_path, looks[0], **more).train()
    arguments = tf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, max_steps=1, max_grad_norm=0.0, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing_kwargs={"use_reentrant": False}, **more,
    )  # fmt: skip
    model = sa_hf.patch_model(tiny_model("llama"), pattern)
    tf.Trainer(model=model, args=arguments, train_dataset=labelled, callbacks=[looks[1]]).train()
    assert looks[0].found.keys() == looks[1].found.keys()
    for name, gradient in looks[1].found.items():
        assert torch.allclose(looks[0].found[name], gradient, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("pattern", [STATIC, EXPIRING], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "options", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packing-bfd", "padding-free"]
)
@checks("trl", "SFTTrainer: packing (bfd) and padding_free give the documents run alone")
def test_packed_batches_equal_the_documents_alone(
    tokenizer: Any, tmp_path: Any, pattern: Any, options: dict[str, Any]
) -> None:
    lengths = (20, 11, 9, 7)
    model = sa_hf.patch_model(tiny_model("llama"), pattern)
    packed: list[tuple[torch.Tensor, dict[str, Any]]] = []

    class Watch(trl.SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, **more: Any) -> Any:
            with torch.no_grad():
                given = {name: value for name, value in inputs.items() if name != "labels"}
                packed.append((model(**given, use_cache=False).logits[0], inputs))
            return super().compute_loss(model, inputs, **more)

    before = copy.deepcopy(model).eval()
    sft(model, tokenizer, rows(lengths), tmp_path, cls=Watch, per_device_train_batch_size=4, **options).train()
    ((logits, inputs),) = packed
    assert "seq_idx" in inputs
    starts = inputs["cu_seq_lens_q"].tolist()
    assert len(starts) == 5
    for begin, end in itertools.pairwise(starts):
        alone = before(inputs["input_ids"][:, begin:end]).logits[0]
        assert torch.allclose(logits[begin:end], alone, atol=1e-4)


def preferences() -> Any:
    return datasets.Dataset.from_list([
        {"prompt": "w3 w4 w5", "chosen": " w6 w7 w8", "rejected": " w9 w10"},
        {"prompt": "w13 w14", "chosen": " w16 w17", "rejected": " w19 w20 w21"},
    ])  # fmt: skip


def dpo(model: Any, tokenizer: Any, folder: Any, reference: Any = None, **more: Any) -> Any:
    options = {
        "per_device_train_batch_size": 2, "max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, **more,
    }  # fmt: skip
    return trl.DPOTrainer(
        model=model, ref_model=reference, args=trl.DPOConfig(str(folder), **options), train_dataset=preferences(),
        processing_class=tokenizer,
    )  # fmt: skip


@checks("trl", "DPOTrainer with ref_model=copy.deepcopy(model)")
def test_dpo_with_a_copy_as_reference(tokenizer: Any, tmp_path: Any) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    dpo(model, tokenizer, tmp_path, copy.deepcopy(model)).train()
    assert int(model.model.layers[0].self_attn.sparse.step) == 1


@pytest.mark.parametrize("saved_sparse", [True, False], ids=["sparse-folder", "patched-in-memory"])
@checks("trl", "DPOTrainer(ref_model=None) raises and names ref_model=copy.deepcopy(model) and LoRA")
def test_dpo_without_a_reference_names_the_remedy(tokenizer: Any, tmp_path: Any, saved_sparse: bool) -> None:
    """trl builds the reference from the concrete class, which runs no code of a checkpoint."""
    model = tiny_model("llama")
    if saved_sparse:
        sa_hf.patch_model(model, EXPIRING).save_pretrained(tmp_path / "saved")
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    else:
        model.save_pretrained(tmp_path / "saved")
        loaded = sa_hf.patch_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), EXPIRING)
    trainer = dpo(loaded, tokenizer, tmp_path / "runs", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"ref_model=copy.deepcopy\(model\).*LoRA"):
        trainer.train()


@checks("trl", "GRPOTrainer with beta > 0: LoRA trains; without, the error names LoRA and beta=0")
@pytest.mark.parametrize("lora", [True, False])
def test_grpo_with_a_reference(tokenizer: Any, tmp_path: Any, lora: bool) -> None:
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    model = sa_hf.patch_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), STATIC)
    arguments = trl.GRPOConfig(
        str(tmp_path / "runs"), beta=0.1, num_generations=2, max_completion_length=4, per_device_train_batch_size=2,
        max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, learning_rate=1e-2,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda completion_ids, **_: [float(sum(row)) for row in completion_ids],
        args=arguments, train_dataset=datasets.Dataset.from_list([{"prompt": "w3 w4 w5"}] * 2),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]) if lora else None,
    )  # fmt: skip
    if not lora:
        with pytest.raises(ValueError, match="GRPO takes none: LoRA, or beta=0"):
            trainer.train()
        return
    trainer.train()
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 0 for p in trained)


@checks("trl", "SFTTrainer and DPOTrainer by path raise and name the loaded model and ref_model=copy.deepcopy(model)")
@pytest.mark.parametrize("make", [sft, dpo], ids=["sft", "dpo"])
def test_a_path_names_the_remedy(make: Any, tokenizer: Any, tmp_path: Any) -> None:
    """trl makes a model of a path by the concrete class, whatever it is told of trust."""
    sa_hf.patch_model(tiny_model("llama"), EXPIRING).save_pretrained(tmp_path / "saved")
    data = (rows((24,)),) if make is sft else ()
    trusting = {"model_init_kwargs": {"trust_remote_code": True}}
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM.*that model and not its path.*copy.deepcopy\(model\)"):
        make(str(tmp_path / "saved"), tokenizer, *data, tmp_path / "runs", **trusting)


@checks("trl", "RewardTrainer on a saved model, by path")
def test_rewards_of_a_folder(tokenizer: Any, tmp_path: Any) -> None:
    config = tiny_model("llama").config
    config.num_labels = 1
    model = sa_hf.patch_model(tf.AutoModelForSequenceClassification.from_config(config), EXPIRING)
    model.save_pretrained(tmp_path / "saved")
    arguments = trl.RewardConfig(
        str(tmp_path / "runs"), max_length=48, per_device_train_batch_size=2, max_steps=1, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, learning_rate=1e-2,
        model_init_kwargs={"trust_remote_code": True},
    )  # fmt: skip
    rows = [{"chosen": "w3 w4 w6 w7", "rejected": "w3 w9 w10"}] * 2
    trainer = trl.RewardTrainer(
        model=str(tmp_path / "saved"), args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    sparse = trainer.model.model.layers[0].self_attn.sparse
    assert int(sparse.step) == 1
    assert not torch.equal(sparse.bias, model.model.layers[0].self_attn.sparse.bias)
