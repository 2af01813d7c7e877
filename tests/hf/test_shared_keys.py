"""Layers that read the keys of others and run the last tokens alone: Gemma 4, by ``logits_to_keep``."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import VOCABULARY, roughened, tokens
from older_releases import OLDER

import sa_hf
from sa_hf import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.forward.masks import MaskRequest

if not hasattr(tf, "Gemma4TextConfig"):
    pytest.skip(f"transformers {tf.__version__} has no Gemma 4", allow_module_level=True)

NARROW, WIDER = (sa_hf.SlidingWindowAttentionConfig(window=window) for window in (3, 7))
EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=8, ramp=4, initial_span=5)


def sharing_model() -> Any:
    """Layers 2 and 3 read the keys of layers 0 (a window of its own) and 1 (full attention, wider heads)."""
    config = tf.Gemma4TextConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        global_head_dim=16, intermediate_size=64, vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY,
        max_position_embeddings=64, hidden_size_per_layer_input=8, num_kv_shared_layers=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return roughened(tf.Gemma4ForCausalLM(config))


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    return {"input_ids": tokens(2, 20), "attention_mask": mask}


CALLS: dict[str, Any] = {
    "whole": lambda: {"input_ids": tokens(2, 20)},
    "padded": padded,
    "packed by ids": lambda: {"input_ids": tokens(1, 20), "sequence_ids": torch.tensor([[0] * 9 + [1] * 11])},
    "packed by positions": lambda: {
        "input_ids": tokens(1, 20), "position_ids": torch.tensor([[*range(9), *range(11)]])
    },
}  # fmt: skip
PATTERNS: dict[str, Any] = {
    "one": {"0-": NARROW}, "readers wider": {"0-1": NARROW, "2-": WIDER}, "readers dense": {"0-1": NARROW},
    "donors dense": {"2-": NARROW}, "all dense": {"0-": "dense"}, "logsparse": {"0-": "logsparse"},
    "donors expire": {"0-1": EXPIRING},
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_last_queries_read_what_they_read_in_the_whole(pattern: str, call: str) -> None:
    model = sa_hf.patch_model(sharing_model(), PATTERNS[pattern])
    given = CALLS[call]()
    with torch.no_grad():
        whole = model(**given, output_hidden_states=True).logits  # which has Gemma 4 run every token everywhere
        for last in (1, 4, 13):
            assert (model(**given, logits_to_keep=last).logits - whole[:, -last:]).abs().max() < 1e-4


@cache
def same_without_a_cache() -> bool:
    """Whether the installed release gives the same with a cache and without, unpatched: 5.5.0 does not (4.8 off)."""
    model = sharing_model()
    with torch.no_grad():
        logits = [model(tokens(2, 20), use_cache=use).logits for use in (False, True)]
    return torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static", "sparse"])
@pytest.mark.parametrize("pattern", ["one", "readers wider", "readers dense", "donors dense", "donors expire"])
def test_generate_is_what_forwards_without_a_cache_give(pattern: str, kind: str) -> None:
    model = sa_hf.patch_model(sharing_model(), PATTERNS[pattern])
    given = padded()
    options: dict[str, Any] = {"cache_implementation": "static"} if kind == "static" else {}
    if kind == "sparse":
        options = {"past_key_values": sa_hf.sparse_cache(model)}
    out = model.generate(**given, max_new_tokens=6, do_sample=False, disable_compile=True, **options)
    ids, mask = given["input_ids"], given["attention_mask"]
    fresh = not same_without_a_cache()
    assert not fresh or OLDER
    with torch.no_grad():
        for _ in range(out.shape[1] - ids.shape[1]):
            ids = torch.cat([ids, model(ids, attention_mask=mask, use_cache=fresh).logits[:, -1:].argmax(-1)], 1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(out, ids)


def test_gradients_reach_shared_keys() -> None:
    """A window as long as the input is the model's own attention."""
    ids, found = tokens(2, 16), []
    for patched in (False, True):
        model = sharing_model().train()
        if patched:
            sa_hf.patch_model(model, "sliding_window", window=64)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-5), name


def test_a_pattern_that_needs_every_token_says_so() -> None:
    model = sa_hf.patch_model(sharing_model(), {"2-": EXPIRING})
    whole = model(tokens(1, 12), use_cache=False).logits
    if OLDER:
        last = model(tokens(1, 12), use_cache=False, logits_to_keep=3).logits
        assert torch.allclose(last, whole[:, -3:], atol=1e-5)
        pytest.skip(f"transformers {tf.__version__} runs every token in every layer")
    with pytest.raises(SparseAttentionError, match=r"last 3 of 12 tokens alone.*logits_to_keep=0.*static"):
        model(tokens(1, 12), use_cache=False, logits_to_keep=3)


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (EXPIRING, "spans"),
        (sa_hf.BlockTopKAttentionConfig(block_size=4, top_k=1), "queries"),
    ],
    ids=["expire_span", "block_topk"],
)
def test_what_a_reader_of_keys_has_no_place_for_is_refused_with_a_cache(pattern: Any, kept: str) -> None:
    """In the layers whose keys they are it is served: `donors expire` above."""
    model = sa_hf.patch_model(sharing_model(), {"2-": pattern})
    model(tokens(1, 12), use_cache=False)
    reason = rf"layer 2 reads the keys of another layer.*'{kept}'.*use a static pattern there.*or use_cache=False"
    for caches in ({"use_cache": True}, {"past_key_values": sa_hf.sparse_cache(model)}):
        with pytest.raises(SparseAttentionError, match=reason):
            model(tokens(1, 12), **caches)


@pytest.mark.parametrize("index", [0, (slice(None), slice(None), slice(2, 5), slice(None)), (slice(None), slice(3))])
def test_another_part_of_a_mask_is_refused(index: Any) -> None:
    request = MaskRequest({"batch_size": 1, "q_length": 8, "kv_length": 8, "mask_function": None})
    with pytest.raises(UnsupportedModelError, match="a pattern can serve the whole, or the last queries"):
        request[index]
