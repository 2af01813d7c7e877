"""T5Gemma 2's decoder: a pattern over its own tokens, and every token of the encoder, in one softmax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import dense_under, log_weights, scattered
from generation_cases import check as check_generation
from gradient_cases import assert_close, with_gradients
from torch import Tensor

import sa_hf
from sa_hf.hf.patching import asking_merged
from sa_hf.tools.families.check import FIRST, build, check
from sa_hf.tools.families.compare import RIGHT, relative_error
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries() if "T5Gemma2" in entry.name}
pytestmark = pytest.mark.skipif(
    not ENTRIES or not asking_merged.MERGED,
    reason=f"transformers {tf.__version__} has no T5Gemma 2, or leaves its decoder",
)
EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=16, ramp=7, initial_span=6)
PATTERNS: dict[str, Any] = {
    "window": sa_hf.SlidingWindowAttentionConfig(window=5, num_sink_tokens=2),
    "bigbird": sa_hf.BigBirdAttentionConfig(
        block_size=8, num_random_blocks=0, num_window_blocks=1, num_global_blocks=1, global_blocks="first"
    ),
    "longnet": sa_hf.LongNetAttentionConfig(segment_length=(8, 16), dilated_ratio=(1, 2)),
    "logsparse": sa_hf.LogSparseAttentionConfig(local_window=2, restart_length=16),
    "fixed": sa_hf.SparseTransformerAttentionConfig(stride=8, summary=2, head_mode="per_head"),
    "expire_span": EXPIRING,
    "sparsebert": sa_hf.SparseBertAttentionConfig(mask_length=64),
}
ALL = sa_hf.SlidingWindowAttentionConfig(window=1000)
SOURCE, TARGET = 23, 40


def tiny(**values: Any) -> Any:
    """A T5Gemma 2 of two layers, the first of which has a window of its own."""
    config = build(ENTRIES["T5Gemma2ForConditionalGeneration"])[0].config
    config.decoder.sliding_window, config.decoder.layer_types = 12, ["sliding_attention", "full_attention"]
    config.decoder.num_hidden_layers = 2
    for name, value in values.items():
        setattr(config.decoder, name, value)
    torch.manual_seed(0)
    return scattered(tf.T5Gemma2ForConditionalGeneration(config).eval())


def patched(pattern: str | Any, **values: Any) -> Any:
    config = PATTERNS[pattern] if isinstance(pattern, str) else pattern
    return scattered(sa_hf.patch_model(tiny(**values), {"decoder": config}))


def inputs(side: str = "right") -> dict[str, Tensor]:
    """Three rows, of which the second and third are padded on one side, in the encoder and the decoder."""
    generator = torch.Generator().manual_seed(2)
    source, target = (torch.randint(5, 28, (3, n), generator=generator) for n in (SOURCE, TARGET))
    masks = [torch.ones_like(x) for x in (source, target)]
    for mask, lengths in zip(masks, ((SOURCE, 9, 17), (TARGET, 31, 11)), strict=True):
        for row, length in enumerate(lengths):
            mask[row, length:] = 0
    source_mask, target_mask = (mask.flip(1) if side == "left" else mask for mask in masks)
    return {
        "input_ids": source, "attention_mask": source_mask, "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
    }  # fmt: skip


def run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of real tokens, and the gradient of every parameter of the model's own."""
    found = with_gradients(model, model(**given).logits[given["decoder_attention_mask"].bool()])
    return {name: x for name, x in found.items() if ".sparse." not in name}


@contextmanager
def own_under_its_pattern(model: Any, given: dict[str, Tensor]) -> Iterator[None]:
    """The model's own eager attention: of each layer the pairs of its pattern, and all of the encoder's tokens."""
    mask, source = given["decoder_attention_mask"], given["attention_mask"]

    def under(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, child = kwargs["hidden_states"], module.sparse
        batch, n = mask.shape
        least = torch.finfo(hidden.dtype).min
        whole = torch.full((batch, child.spec.num_heads, n, n), least, dtype=hidden.dtype)
        for row in range(batch):
            real = mask[row].nonzero().flatten()
            pairs = log_weights(child, module, hidden[row : row + 1, real], child.spec.band.left)
            whole[row, :, real[:, None], real[None, :]] = pairs.clamp(min=least)
        others = torch.where(source.bool(), 0.0, least).to(hidden.dtype)[:, None, None]
        others = others.expand(-1, child.spec.num_heads, n, -1)
        return args, {**kwargs, "merged_attention_mask": torch.cat([whole, others], -1)}

    with dense_under(model, under):
        yield


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_is_the_eager_attention_under_its_pairs(pattern: str, side: str) -> None:
    model, given = patched(pattern), inputs(side)
    ours = run(model, given)
    with own_under_its_pattern(model, given):
        expected = run(model, given)
    assert_close(ours, expected)
    assert ours["model.decoder.layers.1.self_attn.k_proj.weight"].abs().max() > 1e-3
    with sa_hf.dense(model):
        assert relative_error(run(model, given)["output"], expected["output"]) > 1e-2


def test_all_pairs_are_the_models_own_attention() -> None:
    model, given = tiny(), inputs()
    dense = run(model, given)
    sa_hf.patch_model(model, {"decoder": ALL})
    assert_close(run(model, given), dense)
    sa_hf.patch_model(model, {"decoder": {"0": "dense", "1": ALL}})
    assert_close(run(model, given), dense)
    with sa_hf.dense(model):
        assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items())
    sa_hf.unpatch_model(model)
    assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items())


def test_some_queries_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = patched("window"), inputs()
    at_once = run(model, given)
    monkeypatch.setattr(asking_merged, "_SCORES", 7 * SOURCE)
    assert_close(run(model, given), at_once)


def test_a_row_whose_encoder_has_no_token() -> None:
    model, given = patched("window"), inputs()
    given["attention_mask"][1] = 0
    ours = run(model, given)
    with own_under_its_pattern(model, given):
        assert_close(ours, run(model, given))


@pytest.mark.parametrize("cache", ["dynamic", "static", "sparse"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation(pattern: str, cache: str) -> None:
    model = patched(pattern)
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    if cache == "sparse":
        options["past_key_values"] = sa_hf.sparse_cache(model)
    check_generation(model, **options)


@pytest.mark.parametrize("name", ["T5Gemma2ForConditionalGeneration", "T5Gemma2Model"])
def test_both_halves_with_reloads(name: str) -> None:
    found = check(ENTRIES[name])
    assert found.status == RIGHT, found.reason
    assert found.patched == "encoder, decoder"
    wanted = {"reload", f"{FIRST.name} gradients", "padded left"}
    wanted |= {f"generation, {cache}" for cache in ("dynamic", "static", "sparse_cache")} if "For" in name else set()
    assert wanted <= found.figures.keys(), found.notes


def test_sixteen_bits_lose_what_the_models_own_attention_loses() -> None:
    """The encoder's log-sum-exp goes through channels of 16 bits in pieces."""
    model, given = patched("window"), inputs()
    exact = run(model, given)["output"]
    model = model.to(torch.bfloat16)
    ours = run(model, given)["output"]
    with own_under_its_pattern(model, given):
        own = run(model, given)["output"]
    assert relative_error(ours.float(), exact) < 2 * relative_error(own.float(), exact)


def test_a_log_sum_exp_is_whole_in_pieces_of_sixteen_bits() -> None:
    query, key = torch.zeros(1, 2, 9, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 7, 8, dtype=torch.bfloat16)
    total = 20 * torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(3))
    query, key = asking_merged._less(query, key, total, 0.25)
    assert query.dtype == key.dtype == torch.bfloat16
    scores = 0.25 * query.float() @ key.float().mT
    assert torch.allclose(scores, -total[..., None].expand(-1, -1, -1, 7), rtol=1e-6)


def test_dropout_of_weights_is_refused_in_training() -> None:
    model, given = patched("window", attention_dropout=0.1), inputs()
    still = run(model, given)["output"]
    model.train()
    with pytest.raises(sa_hf.SparseAttentionError, match=r"attention_dropout=0\.1 drops weights of the decoder's"):
        model(**given)
    assert torch.equal(run(model.eval(), given)["output"], still)


def test_what_no_layer_has_channels_for_is_refused() -> None:
    with pytest.raises(sa_hf.UnsupportedModelError, match="routing would compare"):
        sa_hf.patch_model(tiny(), {"decoder": sa_hf.RoutingAttentionConfig(num_clusters=3, window=6)})
    with pytest.raises(sa_hf.UnsupportedModelError, match="which a convolution joins"):  # the encoder's keys, too
        sa_hf.patch_model(tiny(), {"decoder": sa_hf.LogSparseAttentionConfig(conv_kernel_size=3)})
