"""How long an input a model takes, and how to lengthen that."""

from __future__ import annotations

from transformers import PreTrainedModel


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input of a model in tokens; None where nothing bounds it (T5) or its inputs are no tokens (ViT)."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
