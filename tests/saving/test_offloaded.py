"""Models whose weights Accelerate keeps elsewhere: the layers of SparseBERT read the first one's mask."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from saving_models import bert, inputs, output
from transformers import AutoModelForSequenceClassification

import sa_hf
from sa_hf.hf.patching.patch import patch_model


def masked():
    model = patch_model(bert(), "sparsebert", mask_length=96)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sparse.logits"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
def test_shared_masks(tmp_path, how, frozen):
    model = masked()
    if frozen:
        sa_hf.freeze_masks(model)
    given = inputs(model)
    expected = output(model, given)
    device = torch.device("cpu")
    if how == "cpu":
        cpu_offload(model, execution_device=device, offload_buffers=True)
    elif how == "disk":
        disk_offload(model, tmp_path / "weights", execution_device=device, offload_buffers=True)
    else:
        model.save_pretrained(tmp_path / "m")
        places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "m", trust_remote_code=True, device_map=places, offload_folder=tmp_path / "weights"
        )
    assert torch.equal(output(model, given), expected)
    assert torch.equal(output(model, given), expected)
    if not frozen:
        shared = model.bert.encoder.layer[0].attention.self.sparse.logits
        assert shared.is_meta
