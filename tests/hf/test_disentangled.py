"""DeBERTa's disentangled attention: its own under the pattern's pairs, for every combination of its terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from gradient_cases import assert_close, with_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sa_hf
from sa_hf.ops.cpp import CppEngine
from sa_hf.ops.parts import ScoreOptions
from sa_hf.tools.families.check import build, check
from sa_hf.tools.families.compare import RIGHT, outputs, relative_error
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 80, "relative_attention": True,
}  # fmt: skip
LENGTH = 60
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=5, num_sink_tokens=1)
ALL = sa_hf.SlidingWindowAttentionConfig(window=100_000)
KINDS = {
    "v3": {"pos_att_type": "p2c|c2p", "position_buckets": 6, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "v2, conv": {"pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "conv_kernel_size": 3, "conv_act": "gelu"},
    "c2p": {"pos_att_type": ["c2p"], "position_buckets": 8, "position_biased_input": False},
    "p2c": {"pos_att_type": ["p2c"], "position_buckets": -1, "max_relative_positions": 7},
    "neither": {"pos_att_type": [], "share_att_key": True},
    "no distances": {"relative_attention": False, "pos_att_type": ["c2p", "p2c"]},
}
FIRST = {
    "both": {"pos_att_type": ["c2p", "p2c"]},
    "few distances": {"pos_att_type": ["c2p", "p2c"], "max_relative_positions": 9},
    "c2p": {"pos_att_type": ["c2p"], "max_relative_positions": 9},
    "p2c": {"pos_att_type": ["p2c"]},
}
CASES = [("v2", name) for name in KINDS] + [("v1", name) for name in FIRST]


def model_of(version: str, kind: str, **values: Any) -> Any:
    torch.manual_seed(0)
    if version == "v1":
        model = tf.DebertaModel(tf.DebertaConfig(**{**SMALL, **FIRST[kind], **values}))
    else:
        model = tf.DebertaV2Model(tf.DebertaV2Config(**{**SMALL, **KINDS[kind], **values}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def inputs(padding: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padding:
        mask[1, 41:] = 0
    return {"input_ids": ids, "attention_mask": mask.flip(1) if padding == "left" else mask}


def run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs on real tokens, and the gradient of every parameter."""
    return with_gradients(model, model(**given).last_hidden_state[given["attention_mask"].bool()])


@pytest.mark.parametrize("padding", ["", "right", "left"])
@pytest.mark.parametrize(("version", "kind"), CASES)
def test_all_pairs_are_the_models_own_attention(version: str, kind: str, padding: str) -> None:
    """Outputs and the gradients of every parameter, the embeddings of distances among them, by its unpatched code."""
    model, given = model_of(version, kind), inputs(padding)
    dense = run(model, given)
    assert any("rel_embeddings" in name for name in dense) == (kind not in ("neither", "no distances"))
    sa_hf.patch_model(model, ALL)
    assert_close(run(model, given), dense)
    sa_hf.patch_model(model, WINDOW)
    narrow = run(model, given)
    assert (narrow["output"] - dense["output"]).norm() > 1e-2 * dense["output"].norm()
    with own_attention(model):
        assert_close(narrow, run(model, given))
    with sa_hf.dense(model):
        assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items())
    sa_hf.unpatch_model(model)
    assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items())


@pytest.mark.parametrize("name", ["DebertaV2ForMaskedLM", "DebertaV2Model", "DebertaForSequenceClassification"])
def test_padding_patterns_and_reloads(name: str) -> None:
    found = check(ENTRIES[name])
    assert found.status == RIGHT, found.reason
    assert {"padded left", "padded left gradients", "reload"} <= found.figures.keys()


@pytest.mark.parametrize("layers", ["0", "1"])
def test_a_layer_left_dense_beside_a_sparse_one(layers: str) -> None:
    for version, kind in (("v2", "v3"), ("v1", "few distances")):
        model, given = model_of(version, kind), inputs()
        dense = run(model, given)
        sa_hf.patch_model(model, ALL, layers=layers)
        assert_close(run(model, given), dense)


def test_a_mask_of_a_model_whose_first_weight_is_of_integers() -> None:
    """As a quantised one is: the mask of a layer left dense is of the others' dtype."""
    model, given = model_of("v2", "v3"), inputs()
    integers = torch.zeros(1, dtype=torch.uint8)
    model.encoder.register_parameter("packed", torch.nn.Parameter(integers, requires_grad=False))
    dense = outputs(model, given)["last_hidden_state"]
    sa_hf.patch_model(model, ALL, layers="0")
    assert relative_error(outputs(model, given)["last_hidden_state"], dense) < 1e-5


def test_heads_with_patterns_of_their_own() -> None:
    """Each part gets the terms of its heads."""
    model, given = model_of("v2", "v3"), inputs()
    dense = run(model, given)
    parts = {"0,3": ALL, "1-2": sa_hf.LongNetAttentionConfig(segment_length=(LENGTH,), dilated_ratio=(1,))}
    sa_hf.patch_model(model, {"encoder": {layer: {"heads": parts} for layer in range(2)}})
    assert_close(run(model, given), dense)


def test_packed_sequences_are_the_sequences_alone() -> None:
    """Distances count inside each; positions of the embedding, too, which this config has none of."""
    model = model_of("v2", "c2p")
    sa_hf.patch_model(model, WINDOW)
    ids = inputs("")["input_ids"][:1]
    numbers = (torch.arange(LENGTH) >= 23).long()[None]
    with torch.no_grad():
        packed = model(ids, sequence_ids=numbers).last_hidden_state
        for part in (ids[:, :23], ids[:, 23:]):
            alone = model(part).last_hidden_state
            first = 0 if part.shape[1] == 23 else 23
            assert torch.allclose(packed[:, first : first + part.shape[1]], alone, atol=1e-5)


def test_dropout_of_distances_and_weights_in_training() -> None:
    """All of the model's own dropouts but that of the weights draw what they do unpatched; that draws its own."""
    model = model_of("v2", "v3", attention_probs_dropout_prob=0.0).train()
    given = inputs()

    def drawn() -> Tensor:
        torch.manual_seed(7)
        out: Tensor = model(**given).last_hidden_state[given["attention_mask"].bool()]
        return out

    dense = drawn()
    sa_hf.patch_model(model, ALL)
    assert torch.allclose(drawn(), dense, atol=1e-4)
    dropping = model_of("v2", "v3", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3)
    sa_hf.patch_model(dropping, WINDOW)
    still = outputs(dropping, given)["last_hidden_state"]
    dropping.train()
    torch.manual_seed(1)
    once = dropping(**given).last_hidden_state[given["attention_mask"].bool()]
    torch.manual_seed(1)
    again = dropping(**given).last_hidden_state[given["attention_mask"].bool()]
    assert torch.equal(once, again)
    assert not torch.allclose(once, still, atol=1e-2)


def test_gradient_checkpointing_gives_the_same() -> None:
    model, given = model_of("v2", "v2, conv").train(), inputs()
    sa_hf.patch_model(model, WINDOW)
    torch.manual_seed(5)
    plain = run(model, given)
    model.gradient_checkpointing_enable()
    torch.manual_seed(5)
    assert_close(run(model, given), plain)


def test_nothing_of_all_pairs_is_built() -> None:
    model = model_of("v2", "v3", max_position_embeddings=2048)
    sa_hf.patch_model(model, WINDOW)
    seen: list[Any] = []
    model.encoder.layer[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    ids, n, largest = torch.randint(3, 99, (1, 1500), generator=torch.Generator().manual_seed(4)), 1500, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            made = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
            largest = max([largest, *(x.numel() for x in made)])
            return out

    with torch.no_grad(), Largest():
        model(ids)
    assert seen[0][1]["relative_pos"] is None
    assert 0 < largest < n * n / 4


def test_what_no_pattern_has_is_refused() -> None:
    model, given = model_of("v2", "v3"), inputs()
    for pattern, values in (("routing", {"num_clusters": 2}), ("block_topk", {}), ("sparsebert", {})):
        with pytest.raises(sa_hf.UnsupportedModelError, match="makes of the distance to the other"):
            sa_hf.patch_model(model, pattern, **values)
    sa_hf.patch_model(model, WINDOW)
    with pytest.raises(sa_hf.SparseAttentionError, match="output_attentions"):
        model(**given, output_attentions=True)
    with pytest.raises(sa_hf.SparseAttentionError, match="relative_pos of all pairs"):
        model.encoder(torch.randn(1, 5, 32), torch.ones(1, 5), relative_pos=torch.zeros(1, 5, 5, dtype=torch.long))
    talking = model_of("v1", "both", talking_head=True)
    with pytest.raises(sa_hf.UnsupportedModelError, match="talking_head"):
        sa_hf.patch_model(talking, WINDOW)


@pytest.mark.parametrize("kind", ["v3", "v2, conv"])
def test_virtual_relays(kind: str) -> None:
    """A learned token has no distance to any other; a convolution over the tokens leaves no room for it."""
    model, given = model_of("v2", kind), inputs()
    if "conv" in kind:
        with pytest.raises(sa_hf.UnsupportedModelError, match="extra token"):
            sa_hf.patch_model(model, "star", relay="virtual")
        return
    sa_hf.patch_model(model, "star", relay="virtual")
    found = run(model, given)
    assert all(x.isfinite().all() for x in found.values())
    whole = {**given, "attention_mask": torch.ones_like(given["attention_mask"])}
    alone = {name: x[1:, :41] for name, x in given.items()}
    with torch.no_grad():
        cut = model(**{name: x[:, :41] for name, x in whole.items()}).last_hidden_state[1:]
        assert torch.allclose(model(**alone).last_hidden_state, cut, atol=1e-5)


def test_summary_asks_for_an_engine_that_has_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("v2", "v3")
    sa_hf.patch_model(model, WINDOW)

    def without_terms(engine: Any, query: Tensor, options: ScoreOptions) -> str | None:
        return None if options.terms == (None, None) else "has no terms"

    monkeypatch.setattr(CppEngine, "unsupported", without_terms)
    for layer in sa_hf.summary(model).layers:
        assert layer.engine == "torch"
        assert layer.reason.endswith("native: has no terms")


def test_compiled_as_one_graph() -> None:
    model, given = model_of("v2", "v3"), inputs()
    sa_hf.patch_model(model, WINDOW)
    expected = outputs(model, given)["last_hidden_state"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(**given).last_hidden_state[given["attention_mask"].bool()]
    assert torch.allclose(found, expected, atol=1e-5)


def test_bfloat16_and_autocast() -> None:
    model, given = model_of("v2", "v3"), inputs()
    sa_hf.patch_model(model, WINDOW)
    expected = outputs(model, given)["last_hidden_state"]
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs(model, given)["last_hidden_state"]
    narrow = outputs(model.bfloat16(), given)["last_hidden_state"]
    for found in (cast, narrow):
        assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_families_are_tried_with_their_distances() -> None:
    for name in ("DebertaModel", "DebertaV2Model"):
        model, _ = build(ENTRIES[name])
        assert model.config.relative_attention
        assert set(model.config.pos_att_type) == {"c2p", "p2c"}
