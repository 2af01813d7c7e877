"""Run as a script by two processes: gradients of a model sharded with FSDP2 equal those of the whole batch at once."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from hf_cases import tiny_model, tokens

import sa_hf

MASKS = {"mask_length": 32, "hard": False, "density_coef": 2.0}
CASES = {
    "a mask that layers share": (sa_hf.SparseBertAttentionConfig(**MASKS), True),
    "a mask for each layer": (sa_hf.SparseBertAttentionConfig(**MASKS, share_layers=False), True),
    "extra tokens": (sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=2), False),
}


def made(config: Any) -> Any:
    return sa_hf.patch_model(tiny_model("bert"), config).train()


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    total = model(ids).last_hidden_state.square().mean()
    for value in (child.aux_losses() for child in model.sa_hf_patch.children(model)):
        total = total + sum(value.values())
    return total


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
batch = tokens(2, 20)
for name, (config, by_layer) in CASES.items():
    plain = made(config)
    for module in (plain, sharded := made(config)):
        # Dropout would differ between one batch and two halves.
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    if by_layer:
        for layer in sharded.encoder.layer:
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss(plain, batch).backward()
    rank = dist.get_rank()
    loss(sharded, batch[rank : rank + 1]).backward()
    whole = dict(plain.named_parameters())
    for key, parameter in sharded.named_parameters():
        if ".sparse." in key:
            assert torch.allclose(parameter.grad.full_tensor(), whole[key].grad, rtol=1e-3, atol=1e-6), (name, key)
            assert whole[key].grad.abs().max() > 0, (name, key)
# No rank takes its group down while the other uses it, and the interpreter's own end is left out: in one run of many a
# rank was aborted there or near it ("terminate called without an active exception": a thread outlived its owner).
dist.barrier()
dist.destroy_process_group()
os._exit(0)
