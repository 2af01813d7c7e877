"""The exporter to ONNX that captures by torch.export (``dynamo=True``), whose converter is onnxscript."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hf_cases import tiny_model, tokens
from used_inside import checks

import sa_hf

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")


def _without_cache(family: str) -> dict[str, Any]:
    return {"use_cache": False} if family == "llama" else {}


@pytest.mark.parametrize(("family", "pattern"), [("bert", "star"), ("bert", "routing"), ("llama", "sliding_window")])
@checks("onnxscript", "torch.onnx.export raises with the reason and names dense(model), inside which it exports")
def test_the_reason_comes_before_any_of_theirs(family: str, pattern: str) -> None:
    model: Any = sa_hf.patch_model(tiny_model(family), pattern)
    given: dict[str, Any] = {"input_ids": tokens(2, 12), **_without_cache(family)}
    with pytest.raises(Exception, match=r"ONNX has no operator.*sa_hf\.dense\(model\)") as caught:
        torch.onnx.export(model, (), kwargs=given, dynamo=True, verbose=False)
    assert isinstance(caught.value.__cause__, sa_hf.SparseAttentionError)
    if family == "bert":
        with sa_hf.dense(model):
            program = torch.onnx.export(model, (), kwargs=given, dynamo=True, verbose=False)
        file = io.BytesIO()
        program.save(file)
        assert file.tell() > 0
        assert "sa_hf" not in str(program.model.graph)


# The search of sparsebert is torch's own operators, which ONNX has.
@pytest.mark.parametrize("pattern", sorted({*sa_hf.available_patterns()} - {"dense", "sparsebert"}))
@checks("onnxscript", "torch.onnx.export of an exported program raises with the same reason")
def test_a_program_of_the_sparse_model_is_refused_with_the_reason(pattern: str) -> None:
    family = "llama" if pattern in ("expire_span", "logsparse", "block_topk") else "bert"
    model: Any = sa_hf.patch_model(tiny_model(family), pattern)
    program = torch.export.export(model, (), {"input_ids": tokens(2, 12), **_without_cache(family)})
    with pytest.raises(Exception, match=r"ONNX has no operator.*sa_hf\.dense\(model\)") as caught:
        torch.onnx.export(program, dynamo=True, verbose=False)
    assert isinstance(caught.value.__cause__, sa_hf.SparseAttentionError)
