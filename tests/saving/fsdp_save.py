"""Run as a script by two processes: shard a patched model with FSDP2, train a step, save from the full state."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from saving_models import inputs, llama, one_step, output

from sa_hf import patch_model

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
model = patch_model(llama(), "expire_span", max_span=64, ramp=8)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert type(model).__name__ == "FSDPLlamaForCausalLM"
one_step(model)
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
model.save_pretrained(folder / "m", is_main_process=dist.get_rank() == 0, state_dict=state)
after = output(model, inputs(model))
if dist.get_rank() == 0:
    torch.save(after, folder / "expected.pt")
dist.destroy_process_group()
