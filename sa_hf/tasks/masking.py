"""Masks of the masked language model: anew in each batch of training, the same ones in every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sa_hf.tasks.packed import PackedRows
from sa_hf.tasks.synthetic import IGNORED

MASKED_SHARE = 0.15
# Evaluation masks do not depend on --seed, so that every model and every run is asked the same.
EVALUATION_SEED = 1
# What stands for the seed 0, which Transformers 5.5 takes for none (findings/collator_takes_seed_zero_for_none.sh).
IN_PLACE_OF_ZERO = 2**31 - 1


class MaskingCollator:
    """Transformers' collator with at least one masked token in a batch, whose mean loss is not defined without.

    Rows that hold ``labels`` are masked already and are stacked as they are.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        import transformers

        self.tokenizer = tokenizer
        self.inner = transformers.DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=MASKED_SHARE, seed=seed or IN_PLACE_OF_ZERO
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if "labels" in rows[0]:
            return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        batch: dict[str, Tensor] = dict(self.inner(rows))
        if bool((batch["labels"] != IGNORED).any()):
            return batch
        ids = batch["input_ids"]
        special = self.tokenizer.get_special_tokens_mask(ids.flatten().tolist(), already_has_special_tokens=True)
        free = [i for i, is_special in enumerate(special) if not is_special] or [0]
        # Any one of them, by what the batch holds.
        chosen = free[int(ids.sum()) % len(free)]
        batch["labels"].view(-1)[chosen] = ids.reshape(-1)[chosen]
        ids.view(-1)[chosen] = self.tokenizer.mask_token_id
        return batch


def masked_once(rows: Sequence[dict[str, Any]], tokenizer: Any) -> Sequence[dict[str, Any]]:
    """Rows with masks and ``labels``: each row's are the same whatever the batch size and the number of processes."""
    collate = MaskingCollator(tokenizer, EVALUATION_SEED)
    masked = PackedRows()
    for row in rows:
        masked.add({name: x[0].tolist() for name, x in collate([row]).items()})
    return masked
