"""sentence-transformers, which may call the model's ``forward`` past its hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from used_inside import checks

sentence_transformers = pytest.importorskip("sentence_transformers")
from hf_cases import tiny_model  # noqa: E402
from words import word_tokenizer  # noqa: E402

import sa_hf  # noqa: E402

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
