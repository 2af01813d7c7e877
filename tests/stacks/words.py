"""A tokenizer of words w3 to w98, whose ids are their numbers: the vocabulary of the tiny models."""

from __future__ import annotations

from typing import Any

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers


def word_tokenizer(**options: Any) -> Any:
    """Args: options: of ``PreTrainedTokenizerFast``, beside the padding and the unknown token."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 99)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", **options)
