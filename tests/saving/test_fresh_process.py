"""Fresh processes, with sa_hf and without it: the same bits, the same files at a re-save, training, unpatching."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saving_models import AUTO, FAMILIES, LEARNED, T5_IS_SERVED, inputs, one_step, output

from sa_hf import SlidingWindowAttentionConfig, available_patterns
from sa_hf.hf.patching.patch import patch_model
from sa_hf.hf.patching.sparse_model import unpatch_model

# Every pattern, and one model with two stacks.
CASES = {name: (*LEARNED.get(name, ("llama", {})), name) for name in available_patterns()}
TWO = "t5" if T5_IS_SERVED else "bart"
CASES["two_stacks"] = (TWO, {}, {"encoder": "bigbird", "decoder": SlidingWindowAttentionConfig(window=5)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    for case, (family, options, pattern) in CASES.items():
        model = patch_model(FAMILIES[family](), pattern, **options)
        if family != TWO:
            one_step(model)
        given = inputs(model)
        model.save_pretrained(folder / case / "model")
        learned = any(".sparse." in name for name, _ in model.named_parameters())
        targets = given.get("decoder_input_ids", given["input_ids"])
        expected = {
            "auto": AUTO[family].__name__,
            "given": given,
            "output": output(model, given),
            "generated": model.generate(**given, max_new_tokens=6, do_sample=False) if family == "llama" else None,
            "labels": {"labels": torch.tensor([0, 1]) if family == "bert" else targets},
            "learned": learned,
        }
        expected["dense"] = output(unpatch_model(model), given)
        torch.save(expected, folder / case / "expected.pt")
    return folder


@pytest.mark.parametrize("how", ["with sa_hf", "without sa_hf"])
def test_fresh_process(tmp_path, folder, how):
    script = Path(__file__).with_name("without_package.py")
    copied = tmp_path / "cases"
    for source in folder.rglob("*"):
        if source.is_file():
            target = copied / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(script), str(copied), *(["block"] if how == "without sa_hf" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [w for case in sorted(CASES) for w in ("served", case)] + ["done"]


def test_another_version_uses_the_carried_code(tmp_path):
    """Beside an installed sa_hf of another version, which may be in use, the checkpoint's own code runs."""
    model = patch_model(FAMILIES["llama"](), "sliding_window", window=3)
    given = inputs(model)
    expected = output(model, given)
    model.save_pretrained(tmp_path / "m")
    script = f"""
import torch, sa_hf
from sa_hf.hf.patching.patch import patch_model
from transformers import AutoModelForCausalLM
sa_hf.__version__ = "999"
given, expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
def load(name="m"):
    return AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name, trust_remote_code=True)
models = [load(), load()]
models[0].save_pretrained({str(tmp_path / "copy")!r})
models.append(load("copy"))
mine = patch_model(load().unpatch_model(), "sliding_window", window=3)
for model in [*models, mine, models[0]]:
    with torch.no_grad():
        assert torch.equal(model(**given)[0], expected)
assert "sa_hf_carried" not in type(mine).__init__.__module__
assert len({{type(m).__init__ for m in models}}) == 1 and type(mine).__init__ is not type(models[0]).__init__
assert {{m.config._attn_implementation for m in models}} != {{mine.config._attn_implementation}}
"""
    torch.save((given, expected), tmp_path / "expected.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
