"""Tiny models of several families; imported without sa_hf too, by processes that know nothing of it."""

import inspect

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention


def made(cls, config_class, **fields):
    """A tiny model of 60 tokens, with the same weights at every call."""
    torch.manual_seed(0)
    return cls(config_class(vocab_size=60, **fields)).eval()


def llama(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 256, "tie_word_embeddings": True}
    return made(LlamaForCausalLM, LlamaConfig, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **options)


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return made(BertForSequenceClassification, BertConfig, max_position_embeddings=128, num_labels=3, **sizes)


def bart():
    of_each = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}
    sizes = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in of_each.items()}
    return made(BartForConditionalGeneration, BartConfig, d_model=32, max_position_embeddings=128, **sizes)


# The oldest release has T5 compute its attention itself, which is refused (tests/hf/test_families.py).
T5_IS_SERVED = "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(T5Attention.forward).__code__.co_names


def t5():
    if not T5_IS_SERVED:
        pytest.skip("this transformers has T5 compute its attention itself")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return made(T5ForConditionalGeneration, T5Config, decoder_start_token_id=0, pad_token_id=0, **sizes)


FAMILIES = {"llama": llama, "bert": bert, "bart": bart, "t5": t5}
AUTO = {
    "llama": AutoModelForCausalLM,
    "bert": AutoModelForSequenceClassification,
    "bart": AutoModelForSeq2SeqLM,
    "t5": AutoModelForSeq2SeqLM,
}
# Where each pattern has the state that it can learn; patterns that are not listed have none.
LEARNED = {
    "sparsebert": ("bert", {"mask_length": 96}),
    "expire_span": ("llama", {"max_span": 64, "ramp": 8}),
    "routing": ("llama", {"num_clusters": 4}),
    "logsparse": ("llama", {"conv_kernel_size": 3}),
    "bigbird": ("bert", {"num_extra_tokens": 2}),
    "star": ("bert", {"relay": "virtual"}),
}


def one_step(model):
    """Train a patched model for one step, so that no state is where it began."""
    given = inputs(model)
    targets = torch.tensor([0, 1]) if "bert" in model.config.model_type else given["input_ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(**given, labels=targets).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def inputs(model, length=80, batch=2):
    """A ragged batch, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 60, (batch, 50), generator=generator)
    return given


@torch.no_grad()
def output(model, given):
    """The first tensor that the model returns."""
    return model(**given)[0]
