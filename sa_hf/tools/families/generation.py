"""Generation with each cache, and a reload by the auto class."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor

import sa_hf
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.patch import required_patch
from sa_hf.tools.families.compare import LIMIT, Result, outputs, relative_error
from sa_hf.tools.families.inputs import padded, parameters
from sa_hf.tools.families.reference import NoReference, own_attention
from sa_hf.tools.families.registry import Entry

NEW_TOKENS = 4


def check_generation(model: Any, inputs: dict[str, Any], found: Result) -> None:
    """Logits of greedy decoding with three caches against the model's own eager attention without any."""
    if not getattr(model, "can_generate", bool)() or not {"input_ids", "attention_mask"} <= inputs.keys():
        return
    given = {name: x for name, x in padded(model, inputs, "left").items() if name != "decoder_input_ids"}
    if "decoder_input_ids" in inputs:
        given["decoder_start_token_id"] = 1
    try:
        with own_attention(model, patterns=False):
            plain, cached = _logits(model, given, use_cache=False), _logits(model, given, use_cache=True)
        if not relative_error(cached, plain) < LIMIT:
            found.notes.append("generation: its own cache changes its logits")
            return
        with own_attention(model):
            expected = _logits(model, given, use_cache=False)
    except (NoReference, SparseAttentionError) as error:
        found.notes.append(f"generation: no reference, {error}")
        return
    except Exception as error:
        found.notes.append(f"generation: the dense model does not: {type(error).__name__}: {str(error)[:120]}")
        return
    if not {"cache", "past_key_values"} & parameters(model).keys():
        found.notes.append("generation: it takes no cache")
        caches: Any = [("none", {"use_cache": False})]
    else:
        caches = _caches(model, given, found, plain)
    for name, extra in caches:
        logits = _logits(model, given, **extra)
        if not relative_error(logits, expected) < LIMIT:
            with own_attention(model, zeros=True):
                zeroed = _logits(model, given, use_cache=False)
            if relative_error(logits, zeroed) < LIMIT:
                found.notes.append(f"generation, {name}: a row of padding is read, which is 0 here")
                expected = zeroed
        found.figures[f"generation, {name}"] = relative_error(logits, expected)


def _caches(model: Any, given: dict[str, Any], found: Result, plain: Tensor) -> Any:
    yield "dynamic", {"use_cache": True}
    static = {"cache_implementation": "static", "use_cache": True}
    try:
        with own_attention(model, patterns=False):
            own = _logits(model, given, **static)
    except Exception as error:
        found.notes.append(f"generation, static: the dense model does not: {type(error).__name__}: {str(error)[:80]}")
    else:
        if relative_error(own, plain) < LIMIT:
            yield "static", static
        else:
            found.notes.append("generation, static: the dense model's own logits change with it")
    if not any(site.spec.causal for site in required_patch(model, "check").sites.all_sites):
        found.notes.append("generation, sparse_cache: it has no causal layers")
    else:
        try:
            cache = sa_hf.sparse_cache(model)
        except SparseAttentionError as error:
            found.notes.append(f"generation, sparse_cache: {error}")
        else:
            yield "sparse_cache", {"past_key_values": cache, "use_cache": True}


def _logits(model: Any, given: dict[str, Any], **options: Any) -> Tensor:
    """``[batch, new tokens, vocabulary]``"""
    with torch.no_grad():
        out = model.generate(
            **given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, disable_compile=True, **options,
        )  # fmt: skip
    return torch.stack(out.logits, 1)


def check_reload(entry: Entry, model: Any, inputs: dict[str, Any], found: Result) -> None:
    """``save_pretrained``, then the auto class with the code of the checkpoint: the same outputs."""
    auto = getattr(transformers, entry.auto)
    if type(model.config) not in auto._model_mapping:  # a config of text alone (Mllama, Emu 3)
        found.notes.append(f"reload: {entry.auto} does not know its {type(model.config).__name__}")
        return
    figure = _reloaded(entry, model, inputs)
    if not figure < LIMIT:
        sa_hf.unpatch_model(model)
        if not _reloaded(entry, model, inputs) < LIMIT:  # weights that a config ties and the model does not (Youtu)
            found.notes.append("reload: the dense model's own outputs change with it")
            return
    found.figures["reload"] = figure


def _reloaded(entry: Entry, model: Any, inputs: dict[str, Any]) -> float:
    """How far the outputs of a saved and loaded model are off."""
    before = outputs(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        auto = entry.auto if entry.auto != "AutoBackbone" else "AutoModel"  # the former reads no folder
        loaded = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    after = outputs(loaded.eval(), inputs)
    return max(relative_error(after[name], value) for name, value in before.items())
