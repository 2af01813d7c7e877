"""torch.export of patched models: batch and length stay open, and each run reads its own mask."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import transformers
from hf_cases import is_served
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.export import Dim, ExportedProgram
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)  # fmt: skip

import sa_hf
from sa_hf import SparseAttentionError, patch_model

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 130,
}  # fmt: skip
MODERN = {"local_attention": 16, "global_attn_every_n_layers": 2, "pad_token_id": 0}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=32, max_position_embeddings=130)
    ),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**SIZES, **MODERN, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    ),
    "t5": lambda: T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
}
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("sliding_window", {"window": 9}),
    ("bigbird", {"block_size": 8}),
    ("longnet", {"segment_length": (16, 64), "dilated_ratio": (1, 4)}),
    ("star", {}),
    ("logsparse", {}),
    ("sparse_transformer", {"kind": "fixed", "stride": 16, "summary": 4}),
]
CASES = [
    *[("bert", *pattern) for pattern in PATTERNS],
    ("bert", "star", {"relay": "virtual"}),
    ("bert", "bigbird", {"block_size": 8, "num_extra_tokens": 3}),
    ("roberta", "bigbird", {"block_size": 8}),
    ("distilbert", "sliding_window", {"window": 9}),
    ("modernbert", "sliding_window", {"window": 9}),
    ("modernbert", "star", {}),
    ("t5", "longnet", {"segment_length": (16, 64), "dilated_ratio": (1, 4)}),
    ("llama", "sliding_window", {"window": 9}),
    ("llama", "logsparse", {}),
]
# Shorter and longer than the example (2, 40), no multiples of a block, one row.
RUNS = [(3, 17), (1, 128), (5, 101), (2, 5)]


def built(kind: str, pattern: str, fields: dict[str, Any]) -> PreTrainedModel:
    if not is_served(kind):
        pytest.skip(f"transformers {transformers.__version__}: {kind} computes its attention itself")
    torch.manual_seed(0)
    model: PreTrainedModel = patch_model(MODELS[kind]().eval(), pattern, **fields)
    return model


def inputs(batch: int, length: int, *, masked: bool, padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length - 3 :] = 0
        mask[-1, :2] = 0
    return {"input_ids": ids} | ({"attention_mask": mask} if masked else {})


def exported(model: PreTrainedModel, masked: bool, **options: Any) -> ExportedProgram:
    call: dict[str, Any] = inputs(2, 40, masked=masked, padded=False)  # whose mask of ones must not be kept
    open_sizes: dict[str, Any] = {
        name: {0: Dim("batch", min=1, max=64), 1: Dim("length", min=4, max=128)} for name in call
    }
    if isinstance(model, LlamaForCausalLM):
        call["use_cache"], open_sizes["use_cache"] = False, None
    return torch.export.export(model, (), call, dynamic_shapes=open_sizes, **options)


def check(program: ExportedProgram, model: PreTrainedModel, masked: bool) -> None:
    cache = {"use_cache": False} if isinstance(model, LlamaForCausalLM) else {}
    run = program.module()
    for batch, length in RUNS:
        call = inputs(batch, length, masked=masked)
        with torch.no_grad():
            torch.testing.assert_close(run(**call, **cache)[0], model(**call, **cache)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*longer")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("kind", "pattern", "fields"), CASES)
def test_an_exported_program_serves_other_batches_and_lengths(
    kind: str, pattern: str, fields: dict[str, Any], masked: bool
) -> None:
    model = built(kind, pattern, fields)
    check(exported(model, masked), model, masked)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_strict_mode_serves_them_too(masked: bool) -> None:
    model = built("bert", "star", {"relay": "virtual"})
    check(exported(model, masked, strict=True), model, masked)


def test_a_program_is_saved_and_loaded() -> None:
    model = built("bert", "bigbird", {"block_size": 8})
    file = io.BytesIO()
    torch.export.save(exported(model, masked=True), file)
    file.seek(0)
    check(torch.export.load(file), model, masked=True)


def frozen(kind: str, **fields: Any) -> PreTrainedModel:
    model = built(kind, "sparsebert", fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logits"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    sa_hf.freeze_masks(model)
    return model


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("structure", ["structured", "unstructured"])
def test_a_frozen_mask_is_exported_on_whole_rows(kind: str, structure: str) -> None:
    model = frozen(kind, mask_length=128, structure=structure)
    check(exported(model, masked=False), model, masked=False)
    with pytest.raises(SparseAttentionError, match=r"export it on whole rows.*sa_hf\.dense\(model\)"):
        exported(model, masked=True)


def test_a_table_shorter_than_the_open_length_is_refused() -> None:
    with pytest.raises(Exception, match="length"):  # torch's own words for the limit
        exported(frozen("bert", mask_length=64, structure="unstructured"), masked=False)


@pytest.mark.parametrize(("pattern", "fields"), [("routing", {}), ("expire_span", {"max_span": 16})])
def test_causal_learned_patterns_are_exported_on_whole_rows(pattern: str, fields: dict[str, Any]) -> None:
    model = built("llama", pattern, fields)
    model(**inputs(2, 40, masked=False), use_cache=False)
    before = sa_hf.figures(model)
    program = exported(model, masked=False)
    assert sa_hf.figures(model) == before  # what a trace saw is not kept
    check(program, model, masked=False)
    with pytest.raises(SparseAttentionError, match=r"export it on whole rows.*sa_hf\.dense\(model\)"):
        exported(model, masked=True)


@pytest.mark.parametrize("pattern", ["sparsebert", "routing"])
def test_what_one_length_decides_is_refused(pattern: str) -> None:
    model = built("bert", pattern, {})
    with pytest.raises(SparseAttentionError, match=r"leaves the length.*freeze_masks.*sa_hf\.dense\(model\)"):
        exported(model, masked=False)
    call = inputs(2, 40, masked=False)
    program = torch.export.export(model, (), call)  # one shape
    other = {"input_ids": call["input_ids"].flip(1)}
    torch.testing.assert_close(program.module()(**other)[0], model(**other)[0])


def test_onnx_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("bert", "star", {})
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # the exporter needs onnxscript
    with pytest.raises(SparseAttentionError, match=r"ONNX has no operator.*sa_hf\.dense\(model\)"):
        exported(model, masked=False)
    # The exporter then tries strict mode, whose tracer takes torch's function for False.
    with pytest.raises(Unsupported, match="ONNX has no operator"):
        exported(model, masked=False, strict=True)
    with sa_hf.dense(model):
        exported(model, masked=False)


@pytest.mark.parametrize(("pattern", "fields"), [("star", {}), ("routing", {"window": 16})])
def test_an_exported_program_goes_to_onnx_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, pattern: str, fields: dict[str, Any]
) -> None:
    """The exporter decomposes a program, which runs the fakes of its operators and no model."""
    program = torch.export.export(built("bert", pattern, fields), (), inputs(2, 40, masked=False))
    program.run_decompositions()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(SparseAttentionError, match=r"ONNX has no operator.*sa_hf\.dense\(model\)"):
        program.run_decompositions()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("kind", "pattern"), [("bert", "star"), ("bert", "routing"), ("llama", "logsparse")])
def test_what_records_or_compiles_source_is_refused_with_the_reason(kind: str, pattern: str) -> None:
    """The older exporter hands a BertModel, dense too, an argument twice: the reason comes before that error."""
    model = built(kind, pattern, {})
    ids = inputs(2, 12, masked=False)["input_ids"]
    whole = (model, ids)
    with pytest.raises(SparseAttentionError, match=r"ONNX has no operator.*sa_hf\.dense\(model\)"):
        torch.onnx.export(*whole, io.BytesIO(), dynamo=False)
    with pytest.raises(SparseAttentionError, match=r"jit\.trace.*sa_hf\.dense\(model\)"):
        torch.jit.trace(*whole, strict=False)
    for part in (model, torch.nn.Sequential(model), model.get_submodule("model" if kind == "llama" else "encoder")):
        with pytest.raises(SparseAttentionError, match=r"jit\.script.*sa_hf\.dense\(model\)"):
            torch.jit.script(part)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_dense_model_is_traced_inside_the_block() -> None:
    model = built("bert", "star", {})
    ids = inputs(2, 12, masked=False)["input_ids"]
    try:
        torch.jit.trace(MODELS["bert"]().eval(), ids, strict=False)
    except IndexError as error:  # 5.5.0
        pytest.skip(f"transformers {transformers.__version__} cannot trace a BertModel of its own: {error}")
    with sa_hf.dense(model):
        traced = torch.jit.trace(model, ids, strict=False)
        expected = model(ids)[0]
    torch.testing.assert_close(traced(ids)["last_hidden_state"], expected)
    assert not torch.allclose(expected, model(ids)[0])
