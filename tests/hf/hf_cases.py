"""Tiny random models of each family, with a ragged batch for each."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import transformers as tf
from older_releases import OLDER
from transformers.models.t5.modeling_t5 import T5Attention

from sa_hf import ExpireSpanAttentionConfig, SparseBertAttentionConfig

transformers_logging = tf.logging
transformers_logging.set_verbosity_error()

VOCABULARY = 99
LENGTHS = (20, 15, 9)
EXPIRING = ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1)
MASKS = SparseBertAttentionConfig(mask_length=32, density_coef=2.0)

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}

CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**_GROUPED, **_TOKENS),
    "qwen3": lambda: tf.Qwen3Config(**_GROUPED, **_TOKENS),
    "mistral": lambda: tf.MistralConfig(**_GROUPED, **_TOKENS, sliding_window=8),
    "gemma2": lambda: tf.Gemma2Config(
        # Older Transformers choose sdpa, which leaves the soft cap out.
        **_GROUPED, **_TOKENS, sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=16,
        attn_implementation="eager",
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_GROUPED, **_TOKENS, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, **_TOKENS),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SIZES, **_TOKENS),
    "opt": lambda: tf.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=VOCABULARY,
        max_position_embeddings=64, word_embed_proj_dim=32, **_TOKENS,
    ),
    "bert": lambda: tf.BertConfig(**_SIZES),
    "roberta": lambda: tf.RobertaConfig(**{**_SIZES, "max_position_embeddings": 66}),
    "xlm_roberta": lambda: tf.XLMRobertaConfig(**{**_SIZES, "max_position_embeddings": 66}),
    "albert": lambda: tf.AlbertConfig(**_SIZES, embedding_size=16),
    "electra": lambda: tf.ElectraConfig(**_SIZES, embedding_size=16),
    "distilbert": lambda: tf.DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=VOCABULARY, max_position_embeddings=64
    ),
    "modernbert": lambda: tf.ModernBertConfig(
        **_SIZES, **_TOKENS, cls_token_id=1, sep_token_id=1, local_attention=8, global_attn_every_n_layers=2
    ),
    "bart": lambda: tf.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCABULARY, max_position_embeddings=64,
        decoder_start_token_id=1, forced_eos_token_id=None, **_TOKENS,
    ),
    "t5": lambda: tf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0,
        eos_token_id=1, pad_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=16,
    ),
    "vit": lambda: tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    ),
}  # fmt: skip

CLASSES: dict[str, Any] = {
    "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM", "opt": "OPTForCausalLM", "bert": "BertModel", "roberta": "RobertaModel",
    "xlm_roberta": "XLMRobertaModel", "albert": "AlbertModel", "electra": "ElectraModel",
    "distilbert": "DistilBertModel", "modernbert": "ModernBertModel", "bart": "BartForConditionalGeneration",
    "t5": "T5ForConditionalGeneration", "vit": "ViTModel",
}  # fmt: skip

FAMILIES = sorted(CONFIGS)
DECODERS = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt"]
ENCODERS = ["bert", "roberta", "xlm_roberta", "albert", "electra", "distilbert", "modernbert"]
BOTH = ["bart", "t5"]


@dataclass
class Case:
    """A model in evaluation mode, its inputs, and which outputs are of real tokens (None: all)."""

    model: Any
    inputs: dict[str, Tensor]
    real: Tensor | None

    def output(self, **changed: Any) -> Tensor:
        """The first output on the real tokens, ``[tokens, features]``."""
        with torch.no_grad():
            out: Tensor = self.model(**{**self.inputs, **changed})[0]
        return out.flatten(0, -2) if self.real is None else out[self.real]


def is_served(family: str) -> bool:
    """Whether the installed release asks the attention interface in this family (T5 does not in the oldest)."""
    return family != "t5" or "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(T5Attention.forward).__code__.co_names


def tiny_model(family: str, seed: int = 0, **changed: Any) -> Any:
    """A model with random weights large enough that attention matters; skips the test where the installed release
    computes the family's attention itself, which ``test_families`` holds to be refused."""
    if not is_served(family):
        pytest.skip(f"transformers {tf.__version__}: {family} computes its attention itself")
    config = CONFIGS[family]()
    for name, value in changed.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return roughened(getattr(tf, CLASSES[family])(config), 0.3 if family != "t5" else 0.15)


def roughened(model: Any, scale: float = 0.3) -> Any:
    """The model in evaluation, with random weights so large that attention matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def accumulated_by_the_release(folder: Any) -> float:
    """What the installed Trainer makes of two micro-batches, against one batch of both, without us: 5.5.0 divides the
    loss by their number twice."""
    found: list[Tensor] = []

    class Look(tf.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    data = [{"input_ids": row, "labels": row} for row in tokens(2, 14)]
    for steps in (1, 2):
        arguments = tf.TrainingArguments(
            str(folder), per_device_train_batch_size=2 // steps, gradient_accumulation_steps=steps, max_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        tf.Trainer(tiny_model("llama"), arguments, train_dataset=data, callbacks=[Look()]).train()
    share = round(float((found[1] @ found[0]) / (found[0] @ found[0])), 4)
    assert share == 1.0 or OLDER
    return share


def right_padded() -> Tensor:
    mask = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, length:] = 0
    return mask


def case(family: str, seed: int = 0, **changed: Any) -> Case:
    model = tiny_model(family, seed, **changed)
    if family == "vit":
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        return Case(model, {"pixel_values": pixels}, None)
    mask = right_padded()
    inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    if family in BOTH:
        inputs["decoder_input_ids"] = tokens(len(LENGTHS), 13, seed=3)
        return Case(model, inputs, None)
    return Case(model, inputs, mask.bool())


def error(got: Tensor, expected: Tensor) -> float:
    """Root-mean-square error relative to the expected tensor's own."""
    return float((got - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt())


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    out = model(**inputs)
    value = out.loss if getattr(out, "loss", None) is not None else out[0].float().square().mean()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
