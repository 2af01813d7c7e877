"""``patch_model`` and ``dense``: putting patterns into a model in place, and leaving them out for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from sa_hf.hf.patching.attach import targets
from sa_hf.hf.patching.families import find_sites
from sa_hf.hf.patching.peft import warn_of_adapter_without_state
from sa_hf.hf.patching.sparse_model import apply_assignment
from sa_hf.hf.state.activity import IMPLEMENTATION, Activity
from sa_hf.hf.state.assignment import parse_assignment
from sa_hf.hf.state.extension import check_tokenizer, plan_extension
from sa_hf.hf.state.patch import patch_of, required_patch
from sa_hf.hf.state.sites import root_model
from sa_hf.hf.state.versions import check_transformers

Model = TypeVar("Model", bound=nn.Module)
_BLOCKS = threading.Lock()  # while a dense(model) begins or ends


def patch_model(
    model: Model,
    pattern: Any,
    *,
    layers: str | int | Iterable[int] | None = None,
    max_length: int | None = None,
    tokenizer: Any = None,
    rope_parameters: dict[str, Any] | None = None,
    engine: str = "auto",
    **options: Any,
) -> Model:
    """Replace the attention of a Transformers model by a sparse pattern, in place.

    Sequences: ``attention_mask [batch, length]`` with padding on either side or inside. Packed rows are told apart by
    ``sequence_ids [batch, length]`` given to the model's forward, by ``cu_seq_lens_q``, or, in decoders without an
    attention mask, by ``position_ids`` that restart; layers left dense see the same sequences, also with ``use_cache``
    on (where Transformers' own mask would not). A gap in them cuts as in Transformers: without a cache only. 4-D masks
    are refused.

    Patch the whole model, not a part of it (``model.bert``): of a part that is patched alone the model around it knows
    nothing. Its ``save_pretrained`` raises, auxiliary losses are not in the figure of its ``loss`` (they reach the
    parameters through it, with a warning), ``max_length`` is not in its config, and every function here takes the part.
    A base model that is used by itself is a whole.

    Args:
        pattern: a name, a config, ``{"0-3": "dense", "4-": config}`` by layers, ``{"heads": {"0-5": config, ...}}`` by
            heads, or ``{"encoder": ..., "decoder": ...}``. Unlisted layers stay dense. Of a multimodal model the
            language stack gets it; ``{"language": ..., "vision": ..., "audio": ...}`` says more. Of an encoder-decoder
            with a half that no pattern can reach (LongT5's encoder) the other half gets it. ``summary`` shows what is
            left.
        layers: "0-3,6" or a list of places in the stack; None is all.
        max_length: lengthen the model to this many tokens, as ``extend_positions`` does; ``unpatch_model`` undoes it.
        tokenizer: gets the new limit, too; without one a warning says that it still cuts at its own.
        rope_parameters: RoPE scaling of a lengthened model. Of ``rope_type="dynamic"``, which scales what is longer
            than the config's ``max_position_embeddings``, that number stays.
        engine: "auto", "triton", "native" or "torch"; what cannot serve a call raises when the model runs.
        options: fields of the config.

    Returns:
        The model itself.

    Raises:
        UnsupportedModelError: the model's attention cannot be replaced exactly; the model stays as it was.
        SparseAttentionError: a wrong pattern, range or option, or a part of the model or the model around it is patched
            already; the model stays as it was.
    """
    check_transformers()
    root = root_model(model)
    check_tokenizer(tokenizer)
    sites = find_sites(root)
    assignment = parse_assignment(
        pattern,
        sites.num_heads,
        towers={name: [site.spec.num_heads for site in tower] for name, tower in sites.towers.items()},
        refused={name: left.reason for name, left in sites.left.items() if left.reason is not None},
        layers=layers,
        options=options,
    )
    lengthening = None
    if max_length is not None or rope_parameters is not None:
        lengthening = plan_extension(root, max_length, tokenizer, rope_parameters)
    apply_assignment(root, assignment, engine=engine, max_length=max_length)
    if lengthening is not None:
        patch = required_patch(root, "patch_model")
        patch.extension = lengthening.apply(root, before=patch.extension)
    warn_of_adapter_without_state(model, (site.name for site, _ in targets(sites.taking(assignment), assignment)))
    return model


@contextmanager
def dense(model: Model) -> Iterator[Model]:
    """The model's original attention inside the block.

    With gradient checkpointing the layers run again in ``backward()``, which then belongs inside the block, too: it
    raises outside. (Of a checkpoint of your own around layers nothing is known here.)

    The model is dense for every thread until the last of the blocks that are open is left.
    """
    root = root_model(model)
    patch = required_patch(root, "dense")
    activity = patch.activity
    with _BLOCKS:
        activity.blocks += 1
        if activity.on:
            activity.on = False
            activity.implementations = {id(config): config._attn_implementation for config, _ in patch.configs}
        for config, original in patch.configs:
            config._attn_implementation_internal = original
    try:
        yield model
    finally:
        with _BLOCKS:
            activity.blocks -= 1
            if not activity.blocks:
                _leave_dense(root, activity)


def _leave_dense(root: PreTrainedModel, activity: Activity) -> None:
    activity.on = True
    now, before = patch_of(root), activity.implementations
    if now is not None and now.activity is activity:  # else unpatched meanwhile: its configs are as they were
        for config, _ in now.configs:
            config._attn_implementation_internal = before.get(id(config), IMPLEMENTATION)
