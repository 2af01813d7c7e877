"""Accelerate's own loop, checkpoints and offloading with patched models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from hf_cases import tiny_model, tokens
from used_inside import checks

import sa_hf

pytestmark = pytest.mark.filterwarnings("ignore")
EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1)
ROWS = [{"input_ids": row, "labels": row} for row in tokens(4, 24)]


def prepared(seed: int = 0, **options: Any) -> tuple[Any, ...]:
    model = sa_hf.patch_model(tiny_model("llama", seed), EXPIRING).train()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    batches = torch.utils.data.DataLoader(ROWS, batch_size=1)
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches)


def steps(accelerator: Any, model: Any, optimizer: Any, batches: Any) -> None:
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()


@checks(
    "accelerate", "Accelerator.accumulate over 4 batches: the gradients of the mean loss, auxiliary losses included"
)
def test_accumulated_gradients() -> None:
    accelerator, model, _, batches = prepared(gradient_accumulation_steps=4)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
    plain = sa_hf.patch_model(tiny_model("llama"), EXPIRING).train()
    (sum(plain(input_ids=r["input_ids"][None], labels=r["labels"][None]).loss for r in ROWS) / 4).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert any(".sparse." in name for name in expected)
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name


@checks("accelerate", "save_state and load_state: training goes on to the same weights and learned state, bit for bit")
def test_state_goes_on(tmp_path: Path) -> None:
    first = prepared()
    steps(*first)
    first[0].save_state(str(tmp_path))
    steps(*first)
    second = prepared(seed=7)
    second[0].load_state(str(tmp_path))
    steps(*second)
    found = [accelerator.unwrap_model(model).state_dict() for accelerator, model, *_ in (first, second)]
    assert found[0].keys() == found[1].keys()
    assert any("sparse" in name for name in found[0])
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
@checks("accelerate", "cpu_offload and disk_offload: outputs bit for bit")
def test_offloaded(tmp_path: Path, how: str) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    with torch.no_grad():
        expected = model(tokens(1, 24)).logits
        if how == "cpu_offload":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert model.model.layers[0].self_attn.q_proj.weight.is_meta
        assert torch.equal(model(tokens(1, 24)).logits, expected)
