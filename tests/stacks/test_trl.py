"""trl's own trainers on patched models."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers as tf
from used_inside import checks

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
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


def saved(pattern: Any, folder: Any) -> str:
    sa_hf.patch_model(tiny_model("llama"), pattern).save_pretrained(folder / "saved")
    return str(folder / "saved")


def is_like(model: Any, folder: str) -> bool:
    """Whether a model is the sparse one in a folder."""
    there = tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return torch.equal(model.eval()(tokens(1, 30)).logits, there(tokens(1, 30)).logits)


@pytest.mark.parametrize("told", [{"trust_remote_code": True}, {"model_init_kwargs": {"trust_remote_code": True}}])
@checks("trl", "SFTTrainer by the path of a sparse folder (trust_remote_code=True): it trains sparse")
def test_sft_by_path(tokenizer: Any, tmp_path: Any, told: dict[str, Any]) -> None:
    folder = saved(EXPIRING, tmp_path)
    trainer = sft(folder, tokenizer, rows((24,)), tmp_path / "runs", **told)
    assert is_like(trainer.model, folder)
    trainer.train()
    sparse = trainer.model.model.layers[0].self_attn.sparse
    assert int(sparse.step) == 1
    trainer.save_model(tmp_path / "trained")
    assert is_like(trainer.model, str(tmp_path / "trained"))


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "model"])
@checks("trl", "DPOTrainer(ref_model=None) on a saved sparse model, by path or loaded: the reference is that model")
def test_dpo_makes_a_reference_of_a_saved_model(tokenizer: Any, tmp_path: Any, by_path: bool) -> None:
    folder = saved(EXPIRING, tmp_path)
    model = folder if by_path else tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    trainer = dpo(model, tokenizer, tmp_path / "runs", trust_remote_code=True, learning_rate=0.1)
    trainer.train()
    assert is_like(trainer.ref_model, folder)
    assert not is_like(trainer.model, folder)


@pytest.mark.parametrize("saved_sparse", [True, False], ids=["without-trust", "patched-in-memory"])
@checks("trl", "DPOTrainer(ref_model=None) else raises and names trust_remote_code, copy.deepcopy(model) and LoRA")
def test_dpo_without_a_reference_names_the_remedy(tokenizer: Any, tmp_path: Any, saved_sparse: bool) -> None:
    """trl builds the reference from where the model was loaded: there is no pattern, or it may not run our code."""
    if saved_sparse:
        loaded = tf.AutoModelForCausalLM.from_pretrained(saved(EXPIRING, tmp_path), trust_remote_code=True)
    else:
        tiny_model("llama").save_pretrained(tmp_path / "saved")
        loaded = sa_hf.patch_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), EXPIRING)
    trainer = dpo(loaded, tokenizer, tmp_path / "runs", trust_remote_code=not saved_sparse)
    with pytest.raises(ValueError, match=r"trust_remote_code=True.*ref_model=copy.deepcopy\(model\).*LoRA"):
        trainer.train()


def grpo(model: Any, tokenizer: Any, folder: Any, peft_config: Any = None, **more: Any) -> Any:
    arguments = trl.GRPOConfig(
        str(folder), beta=0.1, num_generations=2, max_completion_length=4, per_device_train_batch_size=2,
        max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, learning_rate=1e-2, **more,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model, reward_funcs=lambda completion_ids, **_: [float(sum(row)) for row in completion_ids],
        args=arguments, train_dataset=datasets.Dataset.from_list([{"prompt": "w3 w4 w5"}] * 2),
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


@checks("trl", "GRPOTrainer with beta > 0 by the path of a sparse folder: model and reference are sparse")
def test_grpo_by_path(tokenizer: Any, tmp_path: Any) -> None:
    folder = saved(STATIC, tmp_path)
    trainer = grpo(folder, tokenizer, tmp_path / "runs", trust_remote_code=True)
    trainer.train()
    assert is_like(trainer.ref_model, folder)
    assert hasattr(trainer.model, "sa_hf_patch")


@checks("trl", "GRPOTrainer with beta > 0 on a model patched in memory: LoRA trains; without, the error names it")
@pytest.mark.parametrize("lora", [True, False])
def test_grpo_with_a_reference(tokenizer: Any, tmp_path: Any, lora: bool) -> None:
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    model = sa_hf.patch_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), STATIC)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]) if lora else None
    trainer = grpo(model, tokenizer, tmp_path / "runs", config)
    if not lora:
        with pytest.raises(ValueError, match="GRPO takes none: LoRA, or beta=0"):
            trainer.train()
        return
    trainer.train()
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 0 for p in trained)


@checks("trl", "SFTTrainer, DPOTrainer and GRPOTrainer by path without trust_remote_code raise and name it")
@pytest.mark.parametrize("make", [sft, dpo, grpo], ids=["sft", "dpo", "grpo"])
def test_a_path_names_the_remedy(make: Any, tokenizer: Any, tmp_path: Any) -> None:
    data = (rows((24,)),) if make is sft else ()
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM.*takes trust_remote_code=True, too"):
        make(saved(EXPIRING, tmp_path), tokenizer, *data, tmp_path / "runs")


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
