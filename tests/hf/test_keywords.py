"""Keywords of Transformers' own contract pass through a patched model, as they do through the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_cases import tiny_model, tokens
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.hf.forward.keywords import HARMLESS, LOSS_KEYWORDS, SERVED

EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1)


def test_every_keyword_of_the_installed_contract_is_known() -> None:
    """A release that adds one fails here, and somebody looks at whether it changes attention."""
    named = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    assert named <= HARMLESS | SERVED
    assert {"shift_labels", "ignore_index", "weight", "label_smoothing", "num_items_in_batch"} <= LOSS_KEYWORDS
    assert not LOSS_KEYWORDS & SERVED


LABELLED: list[dict[str, Any]] = [
    {"shift_labels": torch.nn.functional.pad(tokens(2, 12)[:, 1:], (0, 1), value=-100)},
    {"ignore_index": 7},
    {"weight": torch.ones(99)},
    {"label_smoothing": 0.1},
    {"num_items_in_batch": 22, "seq_idx": torch.zeros(1, 24, dtype=torch.int32), "max_length_q": 12},
]


@pytest.mark.parametrize("given", LABELLED, ids=lambda given: next(iter(given)))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_of_a_keyword_is_the_dense_models(family: str, given: dict[str, Any]) -> None:
    model = tiny_model(family)
    ids = tokens(2, 12)
    expected = model(ids, labels=ids, **given).loss
    sa_hf.patch_model(model, "sliding_window", window=1000)
    assert torch.allclose(model(ids, labels=ids, **given).loss, expected, atol=1e-5)


def test_a_micro_batch_is_weighed_by_the_labels_that_its_loss_counts() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    ids = tokens(1, 12)
    labels = ids.clone()
    labels[0, 8:] = 5
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=5)
    for given in ({"labels": labels}, {"labels": labels, "shift_labels": shifted}):
        given = {**given, "ignore_index": 5, "num_items_in_batch": 14}
        own = model.eval()(ids, **given).loss
        joined = model.train()(ids, **given).loss
        counted = int((labels[:, 1:] != 5).sum())
        expected = 0.1 * sa_hf.auxiliary_losses(model)["expire_span"] * counted / 14
        # Spans change the output in training no more than in evaluation: shortening is off.
        assert torch.allclose(joined - own, expected, atol=1e-5)


def test_unknown_keywords_still_raise() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), "sliding_window", window=4)
    with pytest.raises(SparseAttentionError, match="alibi"):
        model(tokens(1, 6), alibi=torch.ones(4))
