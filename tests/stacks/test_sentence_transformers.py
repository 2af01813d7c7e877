"""sentence-transformers, which may call the model's ``forward`` past its hooks."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations import peft as peft_of_transformers
from used_inside import checks

sentence_transformers = pytest.importorskip("sentence_transformers")
from hf_cases import tiny_model  # noqa: E402
from words import word_tokenizer  # noqa: E402

import sa_hf  # noqa: E402
from sa_hf.hf.state.patch import patch_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
MASKS = sa_hf.SparseBertAttentionConfig(mask_length=32, density_coef=2.0)
ROUTING = sa_hf.RoutingAttentionConfig(num_clusters=2, window=4)
PAIRS = [{"anchor": "w3 w4 w5 w6", "positive": "w7 w8 w9"}, {"anchor": "w13 w14", "positive": "w16 w17 w18"}]


@pytest.fixture
def encoder(tmp_path: Any) -> Any:
    word_tokenizer().save_pretrained(tmp_path / "bert")
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    return sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")


def trained(encoder: Any, loss: Any, folder: Any) -> None:
    datasets = pytest.importorskip("datasets")
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    sentence_transformers.SentenceTransformerTrainer(
        model=encoder, args=arguments, train_dataset=datasets.Dataset.from_list(PAIRS), loss=loss
    ).train()


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
@checks("sentence-transformers", "training with (Cached)MultipleNegativesRankingLoss: masks learn, centroids start")
def test_learned_patterns_train(encoder: Any, tmp_path: Any, name: str) -> None:
    from sentence_transformers.sentence_transformer import losses

    sa_hf.patch_model(encoder, {"0": MASKS, "1": ROUTING})
    sparse = [module for module in encoder.modules() if hasattr(module, "step")]
    before = sparse[0].logits.detach().clone()
    trained(encoder, getattr(losses, name)(encoder), tmp_path / "runs")
    assert int(sparse[0].step) > 0
    assert (sparse[0].logits[:, :4] < before[:, :4]).float().mean() > 0.9
    assert bool(sparse[1].initialized)


@checks("sentence-transformers", "encode() of a patched encoder equals the dense one under a window that covers all")
def test_encode(encoder: Any) -> None:
    texts = [text for pair in PAIRS for text in pair.values()]
    expected = torch.as_tensor(encoder.encode(texts))
    sa_hf.patch_model(encoder, "sliding_window", window=64)
    assert torch.allclose(torch.as_tensor(encoder.encode(texts)), expected, atol=1e-5)


def is_patched(encoder: Any) -> list[bool]:
    return [patch_of(module) is not None for module in encoder.modules() if isinstance(module, PreTrainedModel)]


def loaded(folder: Any, **options: Any) -> Any:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", **options)


@checks("sentence-transformers", "save and load: the folder comes back sparse, without trust_remote_code it raises")
def test_a_folder(encoder: Any, tmp_path: Any) -> None:
    texts = ["w3 w4 w5 w6 w7 w8 w9", "w13 w14 w15"]
    dense = torch.as_tensor(encoder.encode(texts))
    sa_hf.patch_model(encoder, "sliding_window", window=1)
    expected = torch.as_tensor(encoder.encode(texts))
    assert not torch.allclose(expected, dense, atol=1e-3)
    encoder.save(str(tmp_path / "sparse"))
    again = loaded(tmp_path / "sparse", trust_remote_code=True)
    assert is_patched(again) == [True]
    assert torch.equal(torch.as_tensor(again.encode(texts)), expected)
    with pytest.raises(Exception, match="trust_remote_code=True"):
        loaded(tmp_path / "sparse")


@checks("sentence-transformers", "a Router of two patched towers is saved and loaded, each with its pattern")
def test_router(encoder: Any, tmp_path: Any) -> None:
    from sentence_transformers.models import Pooling, Router, Transformer

    def tower(pattern: str) -> list[Any]:
        transformer = Transformer(str(tmp_path / "bert"))
        sa_hf.patch_model(transformer.auto_model, pattern)
        return [transformer, Pooling(transformer.get_word_embedding_dimension())]

    towers = Router.for_query_document(query_modules=tower("bigbird"), document_modules=tower("star"))
    model = sentence_transformers.SentenceTransformer(modules=[towers], device="cpu")
    model.save(str(tmp_path / "router"))
    again = loaded(tmp_path / "router", trust_remote_code=True)
    text = "w3 w4 w5 w6 w7 w8 w9 w13 w14 w16 w17 w18"
    assert (again.encode_query(text) == model.encode_query(text)).all()
    assert (again.encode_document(text) == model.encode_document(text)).all()
    assert is_patched(again) == [True, True]


@checks("sentence-transformers", "add_adapter (LoRA and learned masks), save and load: the adapter brings the pattern")
def test_an_adapter(encoder: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """Transformers 5.24 asks for PEFT 0.22 there, which is not out: that check alone is lifted."""
    if hasattr(peft_of_transformers, "MIN_PEFT_VERSION"):
        monkeypatch.setattr(peft_of_transformers, "MIN_PEFT_VERSION", peft.__version__)
    texts = ["w3 w4 w5 w6 w7 w8 w9", "w13 w14 w15"]
    sa_hf.patch_model(encoder, MASKS)
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    encoder.add_adapter(sa_hf.prepare_peft(lora, encoder[0].auto_model))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.ones_like(parameter) if "lora" in name else torch.randn(parameter.shape))
    expected = torch.as_tensor(encoder.encode(texts))
    encoder.save(str(tmp_path / "adapter"))
    again = loaded(tmp_path / "adapter", trust_remote_code=True)
    assert is_patched(again) == [True]
    assert torch.allclose(torch.as_tensor(again.encode(texts)), expected, atol=1e-6)
    with pytest.raises(Exception, match="trust_remote_code=True"):
        loaded(tmp_path / "adapter")
