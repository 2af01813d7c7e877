"""Rows of padding are 0 here: a head that reads one says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import SIZES
from hf_cases import error, tokens

import sa_hf
from sa_hf.hf.forward.pooled import FIRST, LAST, pooled_position

COVERING = sa_hf.SlidingWindowAttentionConfig(window=1000)
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def gpt2(head: str, **changed: Any) -> Any:
    return getattr(tf, f"GPT2{head}")(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, **changed)).eval()


MODELS: dict[str, Any] = {
    "Bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)), FIRST),
    "BertModel": (lambda: tf.BertModel(tf.BertConfig(**SIZES)), FIRST),
    "choices": (lambda: tf.BertForMultipleChoice(tf.BertConfig(**SIZES)), FIRST),
    "Roberta": (lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SIZES)), FIRST),
    "ModernBert": (lambda: tf.ModernBertForSequenceClassification(tf.ModernBertConfig(**SIZES, **IDS)), FIRST),
    "a mean": (
        lambda: tf.ModernBertForSequenceClassification(
            tf.ModernBertConfig(**SIZES, **IDS, classifier_pooling="mean")
        ),
        None,
    ),
    "tokens": (lambda: tf.BertForTokenClassification(tf.BertConfig(**SIZES)), None),
    "double heads": (lambda: gpt2("DoubleHeadsModel"), LAST),
    "the last real one": (lambda: gpt2("ForSequenceClassification", pad_token_id=0), None),
    "language": (lambda: gpt2("LMHeadModel"), None),
}  # fmt: skip


def said(model: Any, mask: torch.Tensor, **given: Any) -> list[str]:
    ids = tokens(*mask.shape)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(input_ids=ids, attention_mask=mask, **given)
    return [str(w.message) for w in caught if "position of a row" in str(w.message)]


@pytest.mark.parametrize("case", MODELS)
def test_a_head_that_reads_padding_says_so_once(case: str) -> None:
    make, position = MODELS[case]
    model = make().eval()
    assert pooled_position(model) == position
    sa_hf.patch_model(model, COVERING)
    shape = (2, 3, 12) if case == "choices" else (2, 12)
    left, right = torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
    left[1, ..., :5] = 0
    right[1, ..., 7:] = 0
    safe, unsafe = (right, left) if position == FIRST else (left, right)
    assert said(model, torch.ones(shape, dtype=torch.long)) == []
    assert said(model, safe) == []
    found = said(model, unsafe)
    assert len(found) == (position is not None)
    assert all(type(model).__name__ in message for message in found)
    assert said(model, unsafe) == []


def test_the_position_that_a_call_names_is_the_one_that_counts() -> None:
    model = sa_hf.patch_model(gpt2("DoubleHeadsModel"), COVERING)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    assert said(model, mask, mc_token_ids=torch.tensor([11, 6])) == []
    assert len(said(model, mask, mc_token_ids=torch.tensor([11, 7]))) == 1


def test_what_it_warns_of() -> None:
    """On the side that it names, a pattern that reads everything is the dense model; on the other it is not."""
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :5] = 0
    off = []
    for side in (mask, mask.flip(1)):
        with torch.no_grad():
            sa_hf.unpatch_model(model) if hasattr(model, "sa_hf_patch") else None
            dense = model(input_ids=tokens(1, 12), attention_mask=side).logits
            sa_hf.patch_model(model, COVERING)
            off.append(error(model(input_ids=tokens(1, 12), attention_mask=side).logits, dense))
    assert off[0] > 1e-2
    assert off[1] < 1e-5
