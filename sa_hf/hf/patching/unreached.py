"""Why no pattern reaches a model's attention, and what to patch instead, in an error's words."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from sa_hf.hf.state.versions import more_may_ask

_MODELS_THAT_ASK = (
    "; models that ask: Llama, Qwen3, Mistral, Gemma, GPT-2, GPT-NeoX, OPT, BERT, RoBERTa, DistilBERT, ModernBERT, "
    "ALBERT, ELECTRA, BART, ViT, and T5 from transformers 5.15 on"
)
# Of attention whose maths is another than a pattern's, by the name of its class: what it computes.
_OTHER_MATHS = {
    "VitsAttention": "it adds values of its own for each distance, by weights that a pattern never hands out",
    "FunnelRelMultiheadAttention": "its pooled queries are fewer than its keys and have no places of their own",
    "ProphetNetNgramSelfAttention": "it attends for several streams of predictions at once",
    "LSHSelfAttention": "it is sparse already, by hashes of its tokens",
    "YosoSelfAttention": "it estimates attention by hashes, without a softmax",
    "NystromformerSelfAttention": "it estimates the softmax by landmarks, without pairs that a pattern could choose",
    "MraSelfAttention": "it is sparse already, by blocks that it chooses",
    "IBertSelfAttention": "it computes in integers",
    "RwkvSelfAttention": "it is a recurrence, without pairs of a query and a key",
}  # fmt: skip


def computes_itself(model: PreTrainedModel, part: str) -> str:
    """What an error says of a model none of whose attention asks for the function to call.

    Args: part: what of the model is meant.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    named = f"{part} (model_type {model.config.model_type!r})"
    if not any("ttention" in kind or "Attn" in kind for kind in kinds):
        return (
            f"{named} has no attention: no module of it is called so, and nothing is there to patch{_MODELS_THAT_ASK}"
        )
    why = next((f" ({_OTHER_MATHS[kind]})" for kind in sorted(kinds) if kind in _OTHER_MATHS), "")
    return (
        f"{named} computes its attention itself instead of asking transformers' AttentionInterface for it, so no layer "
        f"can be replaced{why}{_MODELS_THAT_ASK}{more_may_ask()}"
    )


def two_stacks(model: PreTrainedModel, kind: str, one: str, other: str) -> str:
    """What an error says of a model with two stacks of one kind: which model inside it has one of them alone."""
    said = f"{type(model).__name__} has two {kind} stacks, {one!r} and {other!r}; "
    for path, beside in ((one, other), (other, one)):
        part = _model_around(model, path)
        if part and not f"{beside}.".startswith(f"{part}."):
            return f"{said}patch one of its parts, e.g. patch_model(model.get_submodule({part!r}), ...)"
    return f"{said}one pattern cannot mean both, and neither is in a model of its own that could be patched alone"


def _model_around(model: nn.Module, path: str) -> str:
    """The name of the innermost model around a stack; "" where that is the whole."""
    while path:
        if isinstance(model.get_submodule(path), PreTrainedModel):
            return path
        path = path.rpartition(".")[0]
    return ""
