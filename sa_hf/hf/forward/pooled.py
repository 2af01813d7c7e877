"""Heads that read one position of each row, where that is padding.

Attention's output in a row of padding is 0 here, where a dense model lets such a row read the real tokens. Nothing that
is masked shows the difference, but a head that pools the first token of a row padded on the left does.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor, nn

FIRST, LAST = 0, -1


def pooled_position(model: nn.Module) -> int | None:
    """The position that a model's head or pooler reads, FIRST or LAST; None where it reads all, or finds the last real
    token by itself."""
    for name, module in model.named_modules():
        if "SequenceSummary" in type(module).__name__:  # GPT-2's double heads, XLNet, XLM
            kind = getattr(module, "summary_type", None)
            return {"first": FIRST, "last": LAST, "cls_index": LAST}.get(str(kind))
        pools = not name or name.rpartition(".")[2] in ("pooler", "classifier", "score")
        if pools and _reads_first(type(module)) and getattr(model.config, "classifier_pooling", "cls") == "cls":
            return FIRST
    return None


def _reads_first(kind: Any) -> bool:
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return False
    return any(read in source for read in ("[:, 0]", "[:, 0, :]"))


def warn_of_padding(model: nn.Module, position: int, named: dict[str, Any]) -> bool:
    """Warn where the pooled position of some row is padding; returns whether it did."""
    mask, chosen = named.get("attention_mask"), named.get("mc_token_ids")
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        return False
    at = mask[..., position] if chosen is None or position != LAST else mask.gather(-1, chosen[..., None])
    if bool((at != 0).all()):
        return False
    side = "right" if position == FIRST else "left"
    warnings.warn(
        f"the head of {type(model).__name__} reads the {'first' if position == FIRST else 'last'} position of a row, "
        f"which is padding in some: attention gives 0 there, and the dense model another value. Pad on the {side} "
        f"(tokenizer.padding_side = {side!r})",
        stacklevel=2,
    )
    return True
