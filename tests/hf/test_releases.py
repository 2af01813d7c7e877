"""Releases of transformers that hand a layer something else than those tested: found, or refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from generation_cases import PATTERNS, TOLERANCE, check
from hf_cases import tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb

import sa_hf
from sa_hf import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.state import versions

KEEPING = ["expire_span", "routing", "convolution"]
Hand = Callable[[Any, Any, Any], dict[str, Any]]


def release(monkeypatch: pytest.MonkeyPatch, hand: Hand) -> None:
    """Llama of a later release: what its layers hand to their attention are ``hand(cache, mask, angles)``."""

    def layer_forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any
    ) -> Tensor:
        cache = next((kwargs.pop(name) for name in ("cache", "past_key_values") if name in kwargs), None)
        handed = {**kwargs, **hand(cache, attention_mask, position_embeddings)}
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **handed)[0]
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out

    def attention_forward(
        self: Any, hidden_states: Tensor, angles: Any = None, attention_mask: Any = None, store: Any = None,
        is_causal: Any = None, position_embeddings: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = position_embeddings if angles is None else angles["angles"]
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        store = store["inside"] if isinstance(store, dict) else store
        if store is not None:
            key, value = store.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        asked = {} if is_causal is None else {"is_causal": attention_mask is None if is_causal else False}
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **asked, **kwargs
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer_forward)
    monkeypatch.setattr(LlamaAttention, "forward", attention_forward)


def renamed(cache: Any, mask: Any, angles: Any) -> dict[str, Any]:
    return {"store": cache, "attention_mask": mask, "position_embeddings": angles}


def hidden(cache: Any, mask: Any, angles: Any) -> dict[str, Any]:
    """Llama's layers find the cache in a holder of the release's own."""
    return {
        "store": {"inside": cache} if cache is not None else None,
        "attention_mask": mask,
        "position_embeddings": angles,
    }


@pytest.mark.parametrize("pattern", ["window", *KEEPING])
def test_a_cache_is_found_under_any_name(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    release(monkeypatch, renamed)
    model = tiny_model("llama")
    sa_hf.patch_model(model, PATTERNS[pattern])
    check(model)


def test_a_sparse_cache_works_under_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    release(monkeypatch, renamed)
    model = tiny_model("llama")
    sa_hf.patch_model(model, "sliding_window", window=4)
    cache = sa_hf.sparse_cache(model)
    check(model, past_key_values=cache)
    assert all(row["kept"] < row["seen"] for row in cache.report().values())


@pytest.mark.parametrize(
    ("hand", "reason"),
    [
        (hidden, "attends 24 cached keys, but no cache reaches it"),
        (
            lambda cache, mask, angles: {**renamed(cache, mask, angles), "is_causal": False},
            "is causal by its module, but its attention gets is_causal=False",
        ),
        (
            lambda cache, mask, angles: renamed(cache, None, angles),
            "does not get the padding mask that the model was given",
        ),
    ],
    ids=["cache", "is_causal", "mask"],
)
@pytest.mark.parametrize("pattern", ["window", "routing"])
def test_what_does_not_reach_the_adapter_is_refused_and_not_run(
    monkeypatch: pytest.MonkeyPatch, hand: Hand, reason: str, pattern: str
) -> None:
    release(monkeypatch, hand)
    model = tiny_model("llama")
    modules = dict(model.named_modules())
    with pytest.raises(UnsupportedModelError, match=f"decoder layer 0.*{reason}"):
        sa_hf.patch_model(model, PATTERNS[pattern])
    assert dict(model.named_modules()) == modules


def test_a_layer_may_leave_causality_to_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Moonshine's: ``is_causal`` only where no mask is given."""
    release(monkeypatch, lambda cache, mask, angles: {**renamed(cache, mask, angles), "is_causal": "unless masked"})
    model, ids = tiny_model("llama"), tokens(2, 12)
    dense = model(ids).logits
    sa_hf.patch_model(model, "sliding_window", window=1000)
    assert torch.allclose(model(ids).logits, dense, atol=1e-5)
    sa_hf.patch_model(model, PATTERNS["window"])
    check(model)


def test_angles_under_another_name_are_missed_by_what_undoes_the_rotation_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release(
        monkeypatch,
        lambda cache, mask, angles: {"store": cache, "attention_mask": mask, "angles": {"angles": angles}},
    )
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"layer 0.*turns queries and keys, but gets no 'position_emb"):
        sa_hf.patch_model(model, PATTERNS["routing"])
    sa_hf.patch_model(model, PATTERNS["window"])
    check(model)


@pytest.mark.parametrize("pattern", [*KEEPING, "three"])
def test_a_layer_that_gets_older_keys_without_a_cache_raises(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """The probe let it pass, or never ran: the layer itself knows that something is missing."""
    model = tiny_model("llama")
    sa_hf.patch_model(model, PATTERNS[pattern])
    release(monkeypatch, hidden)
    ids = tokens(1, 6)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        first = model(ids[:, :4], use_cache=True)
        assert (first.logits - expected[:, :4]).abs().max() < TOLERANCE  # nothing is older yet
        with pytest.raises(SparseAttentionError, match="attends 5 keys with 1 new tokens, but no cache reached"):
            model(ids[:, 4:5], past_key_values=first.past_key_values)


def test_a_release_newer_than_those_tested_warns_once_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    versions._warn_of_untested.cache_clear()
    with warnings.catch_warnings(record=True) as tested:
        warnings.simplefilter("always")
        sa_hf.patch_model(tiny_model("llama"), "star")
    assert not [w for w in tested if "newest that this sa_hf was tested with" in str(w.message)]
    monkeypatch.setattr(versions.transformers, "__version__", "5.99.1")
    with pytest.warns(UserWarning, match=r"transformers 5\.99\.1 is newer than .*transformers>=5\.5,<="):
        sa_hf.patch_model(tiny_model("llama"), "star")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sa_hf.patch_model(tiny_model("bert"), "star")


def test_the_refusal_of_an_older_release_names_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    canine = tf.CanineModel(tf.CanineConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2))
    for release, later in (("5.5.0", True), (versions.NEWEST_TESTED, False)):
        monkeypatch.setattr(versions.transformers, "__version__", release)
        with pytest.raises(UnsupportedModelError, match=r"T5 from transformers 5\.15 on") as caught:
            sa_hf.patch_model(canine, "star")
        assert ("5.5.0 is installed; later ones" in str(caught.value)) == later


def test_a_saved_model_is_proven_again_where_the_release_is_newer_than_those_tested(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, PATTERNS["window"])
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(versions.transformers, "__version__", "5.99.1")
    monkeypatch.setattr(versions, "_warn_of_untested", lambda version: None)
    ids = tokens(1, 12)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    release(monkeypatch, hidden)
    with pytest.raises(UnsupportedModelError, match="but no cache reaches it"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_the_newest_tested_release_is_the_one_that_ci_pins() -> None:
    pins = (Path(__file__).parents[2] / ".ci" / "constraints.txt").read_text().split()
    assert f"transformers=={versions.NEWEST_TESTED}" in pins
