"""Run as a script, in a process of its own: load checkpoints and compare with what the first process saw.

``python without_package.py FOLDER [block]``: FOLDER holds one folder per case with ``model/`` and ``expected.pt``;
with "block" sa_hf cannot be imported, so the carried code must serve alone.
"""

import sys
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers.models.auto import modeling_auto

folder, blocked = Path(sys.argv[1]), "block" in sys.argv[2:]
if blocked:
    assert "sa_hf" not in sys.modules
    sys.modules["sa_hf"] = None

for case in sorted(folder.iterdir()):
    seen = torch.load(case / "expected.pt", weights_only=True)
    auto = getattr(modeling_auto, seen["auto"])
    model = auto.from_pretrained(case / "model", trust_remote_code=True)
    given = seen["given"]
    with torch.no_grad():
        assert torch.equal(model(**given)[0], seen["output"]), case.name
    if seen["generated"] is not None:
        assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), seen["generated"]), case.name

    model.save_pretrained(case / "again")
    first, again = ({p.name: p.read_bytes() for p in (case / x).iterdir()} for x in ("model", "again"))
    assert first.keys() == again.keys()
    same = [name for name in first if blocked or not name.endswith(".py")]
    if "Bert" in type(model).__name__ and Version(transformers.__version__) < Version("5.6"):
        same.remove("model.safetensors")  # 5.5.0 saves the norms of any BERT that it has loaded as beta and gamma
    # The installed package writes its code as it is now; a copy writes itself.
    assert all(first[name] == again[name] for name in same), case.name

    model.train()
    model(**given, **seen["labels"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(".sparse." in name for name in gradients) == seen["learned"], case.name
    model.eval()

    model.unpatch_model()
    with torch.no_grad():
        assert torch.equal(model(**given)[0], seen["dense"]), case.name
    model.save_pretrained(case / "again")
    plain = auto.from_pretrained(case / "again")
    with torch.no_grad():
        assert torch.equal(plain(**given)[0], seen["dense"]), case.name
    print("served", case.name)

carried, installed = "sa_hf_hf_patching", "sa_hf.hf.patching.sparse_model"
runtimes = {name for name in sys.modules if name == installed or name.endswith(f".{carried}")}
assert len(runtimes) == 1, runtimes
assert (installed not in runtimes) == blocked, runtimes
print("done")
