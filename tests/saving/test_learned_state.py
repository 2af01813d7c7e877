"""Learned sparse state: saved, loaded bit for bit, and loud where it is missing, foreign or of another shape."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from saving_models import AUTO, FAMILIES, LEARNED, bert, inputs, llama, one_step, output
from transformers import AutoModel, AutoModelForSequenceClassification

from sa_hf import (
    ExpireSpanAttentionConfig,
    RoutingAttentionConfig,
    SparseAttentionError,
    UnsupportedModelError,
    available_patterns,
    freeze_masks,
)
from sa_hf.hf.patching.patch import patch_model
from sa_hf.hf.patching.sparse_model import unpatch_model

# A virtual relay starts as a mean and learns nothing.
WITHOUT_STATE = {"star", *(set(available_patterns()) - set(LEARNED))}


def learned(share_layers=False):
    """A BERT with trained mask logits of its own in each layer."""
    model = patch_model(bert(), "sparsebert", mask_length=96, share_layers=share_layers)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".sparse." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith(".sparse.step"):
            buffer.fill_(5)
    return model


def load(folder, auto=AutoModelForSequenceClassification, **options):
    return auto.from_pretrained(folder, trust_remote_code=True, **options)


def sparse_state(model):
    return {name: value for name, value in model.state_dict().items() if ".sparse." in name}


@pytest.mark.parametrize("name", available_patterns())
def test_every_pattern(tmp_path, name):
    """Whatever a pattern learns or counts comes back, after a step of training."""
    family, options = LEARNED.get(name, ("llama", {}))
    model = one_step(patch_model(FAMILIES[family](), name, **options))
    given = inputs(model)
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m", AUTO[family])
    state, again = model.state_dict(), loaded.state_dict()
    assert any(".sparse." in key for key in state) == (name not in WITHOUT_STATE)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert torch.equal(output(loaded, given), output(model, given))
    one_step(loaded).save_pretrained(tmp_path / "m")
    final = load(tmp_path / "m", AUTO[family]).state_dict()
    assert all(torch.equal(final[key], value) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("structure", ["structured", "unstructured"])
def test_frozen_masks(tmp_path, structure):
    model = one_step(patch_model(bert(), "sparsebert", mask_length=96, structure=structure))
    expected = output(model, inputs(model))
    freeze_masks(model).save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert not any("logits" in name for name in loaded.state_dict())
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))
    assert torch.allclose(output(loaded, inputs(model)), expected, atol=1e-5)


def test_patterns_by_heads(tmp_path):
    """State below ``sparse.parts.<i>``."""
    spans, routes = ExpireSpanAttentionConfig(max_span=64, ramp=8), RoutingAttentionConfig(num_clusters=4)
    model = one_step(
        patch_model(llama(), {"0-1": {"heads": {"0-1": spans, "2": routes, "3": "dense"}}, "2": "bigbird"})
    )
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m", AUTO["llama"])
    assert any(".sparse.parts.0." in key for key in loaded.state_dict())
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))


@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("shards", ["50GB", "4KB"])
def test_same_bits(tmp_path, share_layers, shards):
    model = learned(share_layers)
    given = inputs(model)
    model.save_pretrained(tmp_path / "m", max_shard_size=shards)
    loaded = load(tmp_path / "m")
    state = sparse_state(model)
    assert len(state) >= 2
    assert sparse_state(loaded).keys() == state.keys()
    assert all(torch.equal(sparse_state(loaded)[name], state[name]) for name in state)
    assert torch.equal(output(loaded, given), output(model, given))
    assert not torch.equal(output(model, given), output(patch_model(bert(), "sparsebert", mask_length=96), given))
    base = load(tmp_path / "m", AutoModel)
    assert torch.equal(output(base, given), output(model.bert, given))


def test_state_keeps_its_own_dtype(tmp_path):
    """The mask logits are fp32 in a bf16 model, and stay so."""
    model = learned().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".sparse." in name:
            parameter.data = parameter.data.float() + 1e-4
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, value in sparse_state(model).items():
        assert sparse_state(loaded)[name].dtype == value.dtype == (torch.float32 if "logits" in name else torch.int64)
        assert torch.equal(sparse_state(loaded)[name], value)


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


KEY = "bert.encoder.layer.1.attention.self.sparse.logits"
EDITS = {
    "missing": lambda weights: weights.pop(KEY),
    "of another shape": lambda weights: weights.update({KEY: weights[KEY][..., :-3].contiguous()}),
    "unexpected": lambda weights: weights.update({KEY.replace("logits", "spans"): torch.ones(2)}),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModel])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_what_does_not_fit_is_loud(tmp_path, edit, auto, options):
    learned().save_pretrained(tmp_path / "m")
    edit_weights(tmp_path / "m", EDITS[edit])
    with pytest.raises(
        (SparseAttentionError, RuntimeError), match=r"layer\.1\.attention\.self\.sparse|MISMATCH|mismatch"
    ):
        load(tmp_path / "m", auto, **options)


def test_dense_weights_under_a_sparse_config_are_loud(tmp_path):
    learned().save_pretrained(tmp_path / "m")
    bert().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").replace(tmp_path / "m" / "model.safetensors")
    with pytest.raises(SparseAttentionError, match=r"missing.*layer\.0.*layer\.1"):
        load(tmp_path / "m")


def test_a_load_that_reports_nothing_is_loud(tmp_path, monkeypatch):
    """Should a transformers stop calling the method that is overridden, loading fails instead of going unchecked."""
    learned().save_pretrained(tmp_path / "m")
    monkeypatch.setattr(transformers.PreTrainedModel, "_finalize_model_loading", lambda model, config, info: info)
    with pytest.raises(UnsupportedModelError, match="did not report"):
        load(tmp_path / "m")


def test_a_new_head_is_no_error(tmp_path):
    """What Transformers initialises anew by design stays its business."""
    learned().bert.save_pretrained(tmp_path / "m")
    model, info = load(tmp_path / "m", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.std() > 0


def test_train_save_load_train(tmp_path):
    """Gradients reach the loaded state, and a second save carries the change."""
    model = learned()
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m").train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded(**inputs(loaded), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    before, after = sparse_state(model), sparse_state(loaded)
    assert all(not torch.equal(before[name], after[name]) for name in before if "logits" in name)
    loaded.eval().save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m")
    assert all(torch.equal(sparse_state(again)[name], after[name]) for name in after)
    assert torch.equal(output(again, inputs(again)), output(loaded, inputs(loaded)))


def test_unpatched_checkpoint_has_no_sparse_state(tmp_path):
    model = learned()
    model.save_pretrained(tmp_path / "m")
    unpatch_model(model).save_pretrained(tmp_path / "m")
    assert not any(".sparse." in key for key in load_file(tmp_path / "m" / "model.safetensors"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert torch.equal(output(plain, inputs(plain)), output(bert(), inputs(plain)))
