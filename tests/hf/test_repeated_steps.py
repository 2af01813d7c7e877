"""A decoding step's later layers use what the first one settled; the bits are those of the long way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from generation_cases import PATTERNS, generate, prompt
from hf_cases import tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf.hf.caches import sparse
from sa_hf.hf.forward import adapter
from sa_hf.ops.choice import CPP
from sa_hf.ops.parts import ScoreOptions

CANNOT = CPP.unsupported(torch.zeros(1, 1, 1, 16), ScoreOptions(1.0))
pytestmark = pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))
# BigBird's layers have random blocks of their own, SparseBERT's here a mask each.
LISTED = [name for name in PATTERNS if name in ("window", "longnet", "logsparse", "fixed", "bigbird", "star")]
LISTED += ["sparsebert", "sparsebert frozen"]
LEARNED = ["expire_span", "routing", "block_topk", "chosen_by_query"]
CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda model: tf.DynamicCache(config=model.config),
    "static": lambda model: tf.StaticCache(config=model.config, max_cache_len=64),
    "sparse": sa_hf.sparse_cache,
}


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a sparse layer: whether it took the short way."""
    found: list[bool] = []
    step = adapter.repeated_step

    def recorded(*args: Any) -> Tensor | None:
        out = step(*args)
        found.append(out is not None)
        return out

    monkeypatch.setattr(adapter, "repeated_step", recorded)
    return found


def by_the_long_way(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(adapter, "repeated_step", lambda *_: None)
        return run()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("pattern", [*LISTED, *LEARNED])
def test_same_bits_by_both_ways(
    pattern: str, kind: str, repeated: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(sparse, "LEAST_EVICTED", 4)
    model = tiny_model("llama", num_hidden_layers=4)
    if pattern.startswith("sparsebert"):
        sa_hf.patch_model(model, "sparsebert", mask_length=64, share_layers=False)
        generator = torch.Generator().manual_seed(0)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sparse.logits, generator=generator)
    else:
        sa_hf.patch_model(model, PATTERNS[pattern])
        for layer in model.model.layers if pattern == "expire_span" else ():
            torch.nn.init.normal_(layer.self_attn.sparse.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    if pattern == "sparsebert frozen":
        sa_hf.freeze_masks(model)
    ids, mask = prompt()
    if pattern in ("block_topk", "chosen_by_query"):  # rows of one length alone are read in place
        mask = torch.ones_like(mask)

    def run() -> Any:
        return generate(model, ids, mask, past_key_values=CACHES[kind](model))

    short = run()
    assert sum(repeated) >= len(short.logits)
    long = by_the_long_way(monkeypatch, run)
    assert torch.equal(torch.stack(short.logits), torch.stack(long.logits))


COMMITTED = sa_hf.RoutingAttentionConfig(num_clusters=3, window=4, commitment_coef=0.1)


@pytest.mark.parametrize("pattern", [*LEARNED, "sparsebert", "committed"])
def test_losses_and_figures_by_both_ways(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's are of its last step, and not of what stood there before."""

    def after_steps() -> tuple[dict[str, float], Any]:
        model, ids = tiny_model("llama", num_hidden_layers=3), tokens(2, 14)
        sa_hf.patch_model(model, COMMITTED if pattern == "committed" else PATTERNS[pattern])
        cache = tf.DynamicCache(config=model.config)
        with torch.no_grad():
            for start, end in ((0, 11), (11, 12), (12, 13), (13, 14)):
                model(ids[:, start:end], past_key_values=cache)
        return {name: float(loss) for name, loss in sa_hf.auxiliary_losses(model).items()}, sa_hf.figures(model)

    short = after_steps()
    assert any(short)
    assert short == by_the_long_way(monkeypatch, after_steps)


@pytest.mark.parametrize("family", ["gemma3", "mistral", "t5", "gpt2"])
def test_layers_that_differ_are_kept_apart(
    family: str, repeated: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    model = tiny_model(family)
    sa_hf.patch_model(model, {"0": PATTERNS["window"], "1-": PATTERNS["bigbird"]})
    ids, mask = prompt()
    short = generate(model, ids, mask)
    long = by_the_long_way(monkeypatch, lambda: generate(model, ids, mask))
    assert torch.equal(torch.stack(short.logits), torch.stack(long.logits))


def test_patterns_of_all_kinds_in_one_model(repeated: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    names = ["routing", "window", "expire_span", "routing", "sparsebert", "window", "expire_span", "chosen_by_query"]
    sa_hf.patch_model(model, {str(layer): PATTERNS[name] for layer, name in enumerate(names)})
    ids, mask = prompt()
    short = generate(model, ids, torch.ones_like(mask))
    shortened = [any(repeated[layer :: len(names)]) for layer in range(len(names))]
    assert shortened == [name in names[:layer] or name == "sparsebert" for layer, name in enumerate(names)]
    long = by_the_long_way(monkeypatch, lambda: generate(model, ids, torch.ones_like(mask)))
    assert torch.equal(torch.stack(short.logits), torch.stack(long.logits))


def test_what_stands_between_takes_the_long_way(repeated: list[bool]) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    sa_hf.patch_model(model, PATTERNS["window"])
    ids, mask = prompt()

    def ways(**options: Any) -> list[bool]:
        cache = tf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        repeated.clear()
        more = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], dim=1)
        model(ids[:, -1:], attention_mask=more, past_key_values=cache, **options)
        return list(repeated)

    with torch.no_grad():
        assert ways() == [False, True, True]
        with torch.autocast("cpu", torch.bfloat16):
            assert not any(ways())
        seen: list[Any] = []
        hook = model.model.layers[1].self_attn.sparse.register_forward_hook(lambda *_: seen.append(1))
        assert ways() == [False, False, True]
        assert seen
        hook.remove()
        assert ways() == [False, True, True]
    assert not any(ways())  # gradients are wanted
