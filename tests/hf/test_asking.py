"""Architectures that compute their attention themselves, or hand nothing on, and ask the interface while patched."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from older_releases import (
    OLDER,
    REFUSED_THERE,
    WRITTEN_OTHERWISE,
    older_releases_may,
    skip_refused,
    skip_without_reference,
)

import sa_hf
from sa_hf.config import SparseAttention
from sa_hf.hf.patching.asking import CLASSES
from sa_hf.hf.patching.asking_base import Asking
from sa_hf.hf.patching.asking_decoders import bloom_slopes
from sa_hf.hf.patching.asking_indexed import INDEXED
from sa_hf.hf.patching.asking_merged import MERGED
from sa_hf.hf.patching.asking_windows import whole_width
from sa_hf.hf.patching.families import find_sites
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.triton.engine import SMALLEST_HEAD_DIM, _input_reason
from sa_hf.tools.families.check import FIRST, build, check
from sa_hf.tools.families.compare import RIGHT, outputs, relative_error
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
NAMES = [
    "MPNetModel", "RoFormerModel", "MegatronBertModel", "RemBertModel", "TapasModel", "UMT5ForConditionalGeneration",
    "SiglipVisionModel", "Aimv2VisionModel", "GPTNeoForCausalLM", "XGLMForCausalLM", "BloomForCausalLM",
    "MptForCausalLM", "FalconForCausalLM", "BlipForConditionalGeneration", "BlipForQuestionAnswering", "ViltModel",
    "LukeModel", "LiltModel", "SqueezeBertModel", "LongformerModel", "LEDForConditionalGeneration", "GitModel",
    "VisualBertModel", "ConvBertModel", "XLMModel", "FlaubertModel", "BigBirdPegasusModel", "Idefics3VisionTransformer",
    "SmolVLMVisionTransformer", "Siglip2Model",
    "MvpForConditionalGeneration", "TrOCRForCausalLM", "GPTNeoXJapaneseForCausalLM", "OpenAIGPTLMHeadModel",
    "ParakeetEncoder", "Wav2Vec2ConformerModel", "GraniteDoclingVisionModel",
    "VideoMAEModel", "DiffLlamaForCausalLM", "DebertaModel", "DebertaV2Model", "SEWDModel", "WavLMModel",
    "Wav2Vec2BertModel", "SeamlessM4Tv2ForSpeechToText", "SeamlessM4TForSpeechToText",
    "SwinModel", "DonutSwinModel", "MaskFormerSwinModel", "Swinv2Model", "Swin2SRModel", "DogeForCausalLM",
]  # fmt: skip


DENSE = [
    "MPNetModel",
    "LiltModel",
    "GPTNeoForCausalLM",
    "BloomForCausalLM",
    "SiglipVisionModel",
    "Swinv2Model",
    "DogeForCausalLM",
    "DebertaModel",
    "SEWDModel",
    "WavLMModel",
    "Wav2Vec2BertModel",
]


def patch(model: Any, pattern: Any, **options: Any) -> None:
    """Patch a model; skips the test where an older release makes masks or attention itself, which is refused."""
    with older_releases_may(f"{REFUSED_THERE}|{WRITTEN_OTHERWISE}"):
        sa_hf.patch_model(model, pattern, **options)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_padding_generation_and_reloads(name: str) -> None:
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    skip_without_reference(name)
    found = check(ENTRIES[name])
    skip_refused(found)
    assert found.status == RIGHT, found.reason
    assert {"reload", FIRST.name, f"{FIRST.name} gradients"} <= found.figures.keys()
    if "ForC" in name and "generation, none" not in found.figures:  # a model that takes no cache
        assert {"generation, dynamic", "generation, sparse_cache"} <= found.figures.keys(), found.notes


@pytest.mark.parametrize("name", DENSE)
def test_dense_and_unpatched_are_the_original_bit_for_bit(name: str) -> None:
    model, inputs = build(ENTRIES[name])
    classes = {path: type(module) for path, module in model.named_modules()}
    held = _attributes(model)
    before = outputs(model, inputs)
    patch(model, FIRST)
    with sa_hf.dense(model):
        assert _equal(outputs(model, inputs), before)
    assert not _equal(outputs(model, inputs), before)
    sa_hf.unpatch_model(model)
    assert _equal(outputs(model, inputs), before)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert _attributes(model) == held


def _attributes(model: Any) -> dict[str, set[str]]:
    return {path: set(vars(m)) for path, m in model.named_modules() if type(m).__name__ in CLASSES}


def _equal(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_layer_left_dense_beside_a_sparse_one() -> None:
    """Its bias of distances is expanded: with a covering pattern in the other layer all is dense."""
    for name in ("MPNetModel", "LiltModel", "BloomForCausalLM", "GPTNeoForCausalLM", "SwinModel", "DogeForCausalLM"):
        model, inputs = build(ENTRIES[name])
        before = outputs(model, inputs)
        patch(model, "sliding_window", window=1000, layers="1")
        for key, value in outputs(model, inputs).items():
            assert torch.allclose(value, before[key], atol=1e-4, rtol=1e-4), (name, key)


def test_copies_and_pickles_of_a_patched_model() -> None:
    model, inputs = build(ENTRIES["MPNetModel"])
    patch(model, FIRST)
    expected = outputs(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.encoder.layer[0].attention.attn))):
        asking = [module for module in twin.modules() if isinstance(module, Asking)]
        assert asking
        if isinstance(twin, tf.PreTrainedModel):
            assert _equal(outputs(twin, inputs), expected)


def test_mpnet_never_builds_a_bias_of_all_pairs() -> None:
    model, _ = build(ENTRIES["MPNetModel"])
    patch(model, FIRST)
    seen = []
    model.encoder.layer[0].register_forward_pre_hook(lambda m, args: seen.append(args[2].shape))
    with torch.no_grad():
        model(input_ids=torch.randint(5, 28, (1, 50)))
    assert seen == [(1, 4, 1, 99)]


@pytest.mark.parametrize("heads", [1, 3, 4, 8, 12, 40])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    assert torch.allclose(bloom_slopes(heads), theirs)


def test_a_bias_of_boxes_is_refused() -> None:
    """UDOP's depends on where words stand on a page: read as a table of distances it was wrong in silence."""
    model, _ = build(ENTRIES["UdopModel"])
    with pytest.raises(sa_hf.UnsupportedModelError, match="no table of distances"):
        patch(model, FIRST)


@pytest.mark.parametrize("windows", [[8, 16], [16, 8]])
def test_layers_with_windows_of_their_own(windows: list[int]) -> None:
    config = tf.LongformerConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        attention_window=windows, max_position_embeddings=130,
    )  # fmt: skip
    model = tf.LongformerModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, 99, (2, 48), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        for layers in (None, "0", "1"):
            sa_hf.patch_model(model, "sliding_window", window=1000, layers=layers)
            assert torch.allclose(model(ids, attention_mask=mask).last_hidden_state[mask.bool()], expected, atol=1e-4)
            sa_hf.unpatch_model(model)


@pytest.mark.parametrize("layers", ["0", "1", "2-3"])
@pytest.mark.parametrize("name", ["SwinModel", "DonutSwinModel", "Swinv2Model"])
def test_a_pattern_of_one_row_of_a_window(name: str, layers: str) -> None:
    """Of a window of 4 x 4 patches all are kept, or each row of four by itself, which a chunk of 4 is, too: the bias of
    pairs and the mask of shifted windows (layers 1 and 3) stay those of the pairs that are left."""
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    model, inputs = build(ENTRIES[name])
    before = outputs(model, inputs)
    patch(model, "sliding_window", window=16, layers=layers)
    for key, value in outputs(model, inputs).items():
        assert torch.allclose(value, before[key], atol=1e-4, rtol=1e-4), key
    patch(model, "longnet", segment_length=(4,), dilated_ratio=(1,), layers=layers)
    found = outputs(model, inputs)
    assert not _equal(found, before)
    sa_hf.unpatch_model(model)
    with _rows_alone(model, [int(x) for x in layers.split("-")]):
        expected = outputs(model, inputs)
    for key, value in found.items():
        assert torch.allclose(value, expected[key], atol=1e-4, rtol=1e-4), key


@contextlib.contextmanager
def _rows_alone(model: Any, layers: list[int]) -> Iterator[None]:
    """Inside, softmax hides all pairs but those of one row of a window from the layers named, in the model's own code:
    in each forward it is called once a layer."""
    hidden = ~torch.block_diag(*[torch.ones(4, 4, dtype=torch.bool)] * 4)
    softmax, calls = torch.nn.functional.softmax, itertools.count()

    def hiding(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) % 4 in layers:
            scores = scores.masked_fill(hidden, -torch.inf)
        return softmax(scores, *args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.nn.functional, "softmax", hiding)
        yield


def test_doge_where_its_own_mask_would_drop_keys() -> None:
    """It reads the keep_window_size keys of the greatest bias, which is refused where they are not all."""
    config = build(ENTRIES["DogeForCausalLM"])[0].config
    config.keep_window_size = 30
    model = tf.DogeForCausalLM(config).eval()
    ids = torch.randint(5, 28, (2, 30), generator=torch.Generator().manual_seed(0))
    before = outputs(model, {"input_ids": ids})
    patch(model, "sliding_window", window=1000)
    for key, value in outputs(model, {"input_ids": ids}).items():
        assert torch.allclose(value, before[key], atol=1e-4), key
    with pytest.raises(sa_hf.SparseAttentionError, match="load the model with keep_window_size=31"):
        model(torch.cat((ids, ids[:, :1]), 1))
    with pytest.raises(sa_hf.SparseAttentionError, match="load the model with keep_window_size=31"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    with pytest.raises(sa_hf.UnsupportedModelError, match="which routing would compare"):
        sa_hf.patch_model(model, "routing", num_clusters=2, window=4)


def test_a_stack_of_a_model_with_several_is_patched_by_itself() -> None:
    model, inputs = build(ENTRIES["FlavaModel"])
    with pytest.raises(sa_hf.UnsupportedModelError, match=r"patch_model\(model.get_submodule\('text_model'\)"):
        sa_hf.patch_model(model, "sliding_window", window=4)
    text, given = model.text_model, {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        dense = text(**given).last_hidden_state
        patch(text, "sliding_window", window=1000)
        assert relative_error(text(**given).last_hidden_state, dense) < 1e-5
        patch(text, "sliding_window", window=2)
        assert relative_error(text(**given).last_hidden_state, dense) > 1e-3


# Models that other files test.
ELSEWHERE = [
    "AXK2Model", "DeepseekV32Model", "Dots3NoteTextModel", "GlmMoeDsaModel", "HYV4Model", "HYV4VLTextModel",
    "LayoutLMv3Model", "MistralLarge4TextModel", "Sam3LiteTextTextModel", "SpeechT5ForSpeechToText", "T5Gemma2Model",
    "VJEPA2Model", "XLNetModel",
]  # fmt: skip


def test_the_table_names_classes_that_transformers_has() -> None:
    found: set[str] = set()
    for name in (*NAMES, *ELSEWHERE, "FlavaModel"):
        if name in ENTRIES:
            model, _ = build(ENTRIES[name])
            found |= {type(module).__name__ for module in model.modules()}
            found |= {f"{type(m).__module__.rpartition('.')[2]}.{type(m).__name__}" for m in model.modules()}
    elsewhere = {"SwinSelfAttention"}  # of another release
    if OLDER:
        elsewhere = {"GraniteDoclingVisionAttention", "Sam3LiteTextTextAttention", *MERGED, *INDEXED}
    assert set(CLASSES) - elsewhere <= found


def test_what_no_pattern_has_is_refused_where_it_is_given() -> None:
    """Global tokens of Longformer, entities of LUKE and MVP's prompts have projections or places of their own."""
    longformer, inputs = build(ENTRIES["LongformerModel"])
    sa_hf.patch_model(longformer, FIRST)
    everywhere = torch.zeros_like(inputs["input_ids"])
    assert _equal(outputs(longformer, {**inputs, "global_attention_mask": everywhere}), outputs(longformer, inputs))
    everywhere[:, 0] = 1
    with pytest.raises(sa_hf.SparseAttentionError, match="global tokens of Longformer"):
        longformer(**inputs, global_attention_mask=everywhere)
    luke, inputs = build(ENTRIES["LukeModel"])
    sa_hf.patch_model(luke, FIRST)
    entities = torch.ones(len(inputs["input_ids"]), 1, dtype=torch.long)
    with pytest.raises(sa_hf.SparseAttentionError, match="LUKE's entities"):
        luke(**inputs, entity_ids=entities, entity_position_ids=entities[..., None].expand(-1, -1, 3))
    config = build(ENTRIES["MvpModel"])[0].config
    config.use_prompt = True
    mvp = tf.MvpModel(config).eval()
    with pytest.raises(sa_hf.SparseAttentionError, match="MVP's prompts"):
        sa_hf.patch_model(mvp, FIRST)


def test_a_ready_made_mask_of_padding_is_read_and_one_that_adds_more_is_not() -> None:
    model, inputs = build(ENTRIES["LayoutLMModel"])
    sa_hf.patch_model(model, FIRST)
    soft = torch.zeros(2, 1, 1, inputs["input_ids"].shape[1])
    soft[..., 3] = -2.0
    with pytest.raises(sa_hf.SparseAttentionError, match="adds numbers to the scores"):
        model.encoder.layer[0].attention.self(torch.randn(2, soft.shape[-1], 64), soft)


def test_a_stack_inside_another_model_is_not_the_language_model() -> None:
    """SeamlessM4T has an encoder and a decoder of units inside the model that translates."""
    model, _ = build(ENTRIES["SeamlessM4TModel"])
    with older_releases_may(REFUSED_THERE):
        sites = find_sites(model)
    assert {name: sites.stacks[name][0].name.split(".")[0] for name in sites.stacks} == {
        "encoder": "text_encoder", "decoder": "text_decoder",
    }  # fmt: skip
    assert any(path.startswith("t2u_model") for path in sites.left)


def test_differential_attention_asks_once_a_layer() -> None:
    """It asked for the values of each half of its heads: a sparse cache let keys go that the second call read."""
    model, inputs = build(ENTRIES["DiffLlamaForCausalLM"])
    dense = outputs(model, inputs)
    patch(model, "sliding_window", window=1000)
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, SparseAttention):
            module.register_forward_hook(lambda child, args, out: calls.append(id(child)))
    for key, value in outputs(model, inputs).items():
        assert torch.allclose(value, dense[key], atol=1e-4, rtol=1e-4), key
    assert len(calls) == len(set(calls)) == model.config.num_hidden_layers
    patch(model, "routing", num_clusters=2)  # which compares queries and keys from before the rotary embedding


def test_widened_rows_are_what_the_kernels_take_and_no_wider() -> None:
    for width in range(SMALLEST_HEAD_DIM - 7, 200):
        whole = whole_width(width)
        taken = [
            w for w in range(width, whole + 1) if _input_reason(torch.empty(1, 1, 1, w), ScoreOptions(1.0)) is None
        ]
        assert taken == [whole]


def test_swin_v2_adds_its_mask_of_shifted_windows_twice() -> None:
    """Seen where it is small: of its own -100, once hides as well as twice."""
    model, inputs = build(ENTRIES["Swinv2Model"])
    for module in model.modules():
        if hasattr(module, "get_attn_mask"):
            module.get_attn_mask = _small(module.get_attn_mask)
    before = outputs(model, inputs)
    patch(model, "sliding_window", window=16)
    for key, value in outputs(model, inputs).items():
        assert torch.allclose(value, before[key], atol=1e-4, rtol=1e-4), key


def _small(mask_of: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        mask = mask_of(*args, **kwargs)
        return None if mask is None else 0.01 * mask

    return made


def test_doges_bias_is_that_of_each_key() -> None:
    """Its ``A`` begins as 0, which makes one bias of all keys."""
    model, inputs = build(ENTRIES["DogeForCausalLM"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = outputs(model, inputs)
    patch(model, "sliding_window", window=1000)
    for key, value in outputs(model, inputs).items():
        assert torch.allclose(value, before[key], atol=1e-4), key
