"""A part of a model that is patched by itself, and a part of a model that is patched as a whole."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.state import AcceleratorState
from hf_cases import CONFIGS, tiny_model, tokens

import sa_hf
from sa_hf import SparseAttentionError

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3)
MASKS = sa_hf.SparseBertAttentionConfig(mask_length=32)


def classifier(cls: Any = tf.BertForSequenceClassification) -> Any:
    torch.manual_seed(0)
    return cls(CONFIGS["bert"]()).eval()


OUTER: dict[str, tuple[Any, str]] = {
    "llama": (lambda: tiny_model("llama"), "model"),
    "bert": (classifier, "bert"),
    "t5": (lambda: tiny_model("t5"), "encoder"),
}


@pytest.mark.parametrize("family", OUTER)
@pytest.mark.parametrize("given", [False, True], ids=["own weights", "given weights"])
def test_a_model_around_a_patched_part_does_not_save_dense(family: str, given: bool, tmp_path: Path) -> None:
    make, name = OUTER[family]
    model = make()
    part = sa_hf.patch_model(model.get_submodule(name), WINDOW)
    state = model.state_dict()
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(SparseAttentionError, match=rf"part '{name}' .* dense checkpoint.*patch_model\(model"):
            one.save_pretrained(tmp_path / "m", **({"state_dict": state} if given else {}))
    assert not (tmp_path / "m").exists()
    part.save_pretrained(tmp_path / "part")
    assert (tmp_path / "part" / "modeling_sa_hf.py").exists()
    sa_hf.unpatch_model(part)
    sa_hf.patch_model(model, WINDOW).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "modeling_sa_hf.py").exists()


def test_a_patched_model_put_into_another_later_is_seen_too(tmp_path: Path) -> None:
    model = classifier()
    model.bert = sa_hf.patch_model(tiny_model("bert"), WINDOW)
    with pytest.raises(SparseAttentionError, match="part 'bert'"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_trainer_does_not_save_dense_either(tmp_path: Path) -> None:
    model = classifier()
    sa_hf.patch_model(model.bert, WINDOW)
    arguments = tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(SparseAttentionError, match="dense checkpoint"):
        tf.Trainer(model, arguments).save_model(str(tmp_path / "m"))


def test_a_class_of_ones_own_that_patches_its_part_saves_with_a_warning(tmp_path: Path) -> None:
    class Mine(tf.BertForSequenceClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            sa_hf.patch_model(self.bert, WINDOW)

    model = classifier(Mine)
    with pytest.warns(UserWarning, match="part 'bert' of this Mine"):
        model.save_pretrained(tmp_path)
    loaded = Mine.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(tokens(1, 20)).logits, model(tokens(1, 20)).logits, atol=1e-7)
    assert sa_hf.summary(loaded.bert).layers[0].pattern == "sliding_window"


def test_wholes_and_modules_that_only_ask_for_weights_save_as_ever(tmp_path: Path) -> None:
    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = sa_hf.patch_model(tiny_model("bert"), WINDOW)

    wrapped = Embedder()
    torch.save(torch.nn.Sequential(wrapped).state_dict(), tmp_path / "w.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped.auto_model.save_pretrained(tmp_path / "base")
        tiny_model("bert").save_pretrained(tmp_path / "dense")
        sa_hf.patch_model(tiny_model("t5"), WINDOW).save_pretrained(tmp_path / "t5")


def test_the_losses_of_a_part_reach_it_through_the_loss_around_it() -> None:
    """With a warning: by what the model around it divides or multiplies is not known."""
    labels = torch.tensor([0])
    whole = sa_hf.patch_model(classifier().train(), MASKS)
    model = classifier().train()
    sa_hf.patch_model(model.bert, MASKS)
    torch.manual_seed(0)  # dropout is on
    whole(tokens(1, 9), labels=labels).loss.backward()
    AcceleratorState._reset_state(True)  # an earlier test may have had an Accelerator, which says the scale
    torch.manual_seed(0)
    loss = model(tokens(1, 9), labels=labels).loss
    with pytest.warns(UserWarning, match="sparsebert_density.*not output.loss"):
        loss.backward()
    name = "bert.encoder.layer.0.attention.self.sparse.logits"
    assert torch.allclose(model.get_parameter(name).grad, whole.get_parameter(name).grad, atol=1e-5)
    static = classifier().train()
    sa_hf.patch_model(static.bert, WINDOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(1, 9), labels=labels).loss.backward()
        static(tokens(1, 9), labels=labels).loss.backward()


def test_functions_given_the_other_one_say_which_is_patched() -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model.model, WINDOW)
    for function in (sa_hf.unpatch_model, sa_hf.summary, sa_hf.sparse_cache, sa_hf.auxiliary_losses):
        with pytest.raises(SparseAttentionError, match=r"its part 'model' is: give \w+\(model.get_submodule\('model'"):
            function(model)
    sa_hf.unpatch_model(model.model)
    sa_hf.patch_model(model, WINDOW)
    with pytest.raises(SparseAttentionError, match="the LlamaForCausalLM that it is a part of"):
        sa_hf.unpatch_model(model.model)


@pytest.mark.parametrize("pattern", ["star", "dense", WINDOW])
def test_a_part_of_a_patched_model_is_not_patched_again(pattern: Any) -> None:
    model, ids = tiny_model("llama"), tokens(1, 30)
    with torch.no_grad():
        dense = model(ids).logits
        sa_hf.patch_model(model, WINDOW)
        sparse = model(ids).logits
        with pytest.raises(SparseAttentionError, match=r"LlamaModel is a part of a LlamaForCausalLM that is patched"):
            sa_hf.patch_model(model.model, pattern)
        assert torch.equal(model(ids).logits, sparse)
        assert torch.equal(sa_hf.unpatch_model(model)(ids).logits, dense)
        sa_hf.patch_model(model.model, pattern)
        sa_hf.unpatch_model(model.model)
        assert torch.equal(model(ids).logits, dense)


def test_a_model_with_a_patched_part_is_not_patched() -> None:
    model = tiny_model("t5")
    sa_hf.patch_model(model.encoder, WINDOW)
    with pytest.raises(SparseAttentionError, match=r"part 'encoder' .* unpatch_model\(model\.get_submodule"):
        sa_hf.patch_model(model, "star")
    sa_hf.patch_model(model.encoder, "star")
    sa_hf.patch_model(model.decoder, WINDOW)
    assert [sa_hf.summary(m, 9).layers[0].pattern for m in (model.encoder, model.decoder)] == ["star", "sliding_window"]
