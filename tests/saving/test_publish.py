"""An interrupted save leaves the old checkpoint, the new one, or a folder that does not load."""

import json
import os

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from sa_hf.hf.checkpoints import publish
from sa_hf.hf.checkpoints.files import HEADER
from sa_hf.hf.checkpoints.publish import save_whole
from sa_hf.hf.patching.patch import patch_model

CODE = {"modeling_sa_hf.py": HEADER + "new = 1\n", "sa_hf_config.py": HEADER}


class Killed(BaseException):
    """Stands for the end of the process."""


def bert(fill: float) -> BertModel:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, mark=fill
    )
    model = BertModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, fill)
    return model


def save(model, folder, code=CODE, **options):
    save_whole(model, model.save_pretrained, lambda: code, folder, (), options)


def loaded(folder) -> tuple[float, float] | None:
    """The mark of the config and of the weights that a load gives; None where it raises."""
    try:
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    except (OSError, ValueError):
        return None
    return model.config.mark, model.embeddings.word_embeddings.weight[0, 0].item()


def test_writes_what_save_pretrained_writes_and_the_code(tmp_path):
    bert(1.0).save_pretrained(tmp_path / "plain")
    save(bert(1.0), tmp_path / "whole")
    plain, whole = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in ("plain", "whole"))
    assert whole == plain | {name: text.encode() for name, text in CODE.items()}


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("old_shards", ["50GB", "1KB"])
@pytest.mark.parametrize("new_shards", ["50GB", "1KB"])
def test_killed_at_any_step(tmp_path, monkeypatch, step, old_shards, new_shards):
    """Every file operation of the last phase, and the writing of the weights, is cut off in turn."""
    bert(1.0).save_pretrained(tmp_path, max_shard_size=old_shards)
    count = 0

    def counted(operation):
        def wrapper(*args, **kwargs):
            nonlocal count
            if count == step:
                raise Killed
            count += 1
            return operation(*args, **kwargs)

        return wrapper

    import transformers.modeling_utils as modeling

    monkeypatch.setattr(modeling, "safe_save_file", counted(modeling.safe_save_file))
    monkeypatch.setattr(publish.os, "replace", counted(os.replace))
    monkeypatch.setattr(publish.Path, "unlink", counted(publish.Path.unlink))
    monkeypatch.setattr(publish.shutil, "rmtree", lambda *a, **k: None)  # a killed process cleans nothing up
    try:
        save(bert(2.0), tmp_path, max_shard_size=new_shards)
        finished = True
    except Killed:
        finished = False
    monkeypatch.undo()
    assert loaded(tmp_path) in ([(2.0, 2.0)] if finished else [(1.0, 1.0), None])
    save(bert(3.0), tmp_path)
    assert loaded(tmp_path) == (3.0, 3.0)


def test_stale_shards_and_code_go_and_other_files_stay(tmp_path):
    save(bert(1.0), tmp_path, max_shard_size="1KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    kept = {"notes.txt": "mine", "sa_hf_notes.py": "print('mine')\n", "model.fp16.safetensors": "other variant"}
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    save(bert(2.0), tmp_path, code={})
    assert shards
    assert not any(path.exists() for path in shards)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", *kept}
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    assert loaded(tmp_path) == (2.0, 2.0)


def test_a_single_file_gives_way_to_shards(tmp_path):
    """Transformers alone leaves the old model.safetensors, which then wins over the index."""
    bert(1.0).save_pretrained(tmp_path)
    save(bert(2.0), tmp_path, max_shard_size="1KB")
    assert loaded(tmp_path) == (2.0, 2.0)


def test_variant(tmp_path):
    save(bert(1.0), tmp_path)
    save(bert(2.0), tmp_path, variant="fp16")
    save(bert(3.0), tmp_path, variant="fp16", max_shard_size="1KB")
    names = {p.name for p in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert "model.safetensors.index.fp16.json" in names
    assert "model.fp16.safetensors" not in names
    model = AutoModel.from_pretrained(tmp_path, variant="fp16", add_pooling_layer=False)
    assert model.embeddings.word_embeddings.weight[0, 0].item() == 3.0


def test_failure_leaves_no_trace(tmp_path, monkeypatch):
    bert(1.0).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    import transformers.modeling_utils as modeling

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(modeling, "safe_save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(bert(2.0), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_processes_that_do_not_write(tmp_path):
    """They do what Transformers does there, and add nothing."""
    model = bert(1.0)
    save_whole(model, model.save_pretrained, lambda: pytest.fail("asked for code"), tmp_path / "a", (False,), {})
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert [p.name for p in (tmp_path / "a").iterdir()] == [p.name for p in (tmp_path / "b").iterdir()]


def test_push_to_hub(tmp_path, monkeypatch):
    """The upload follows the local save and names exactly the checkpoint's files."""
    import huggingface_hub

    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = (repo_id, options)
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, **options):
            calls["upload"] = options
            calls["config"] = json.loads((tmp_path / "mine" / "config.json").read_text())["mark"]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "private.txt").write_text("not uploaded")
    save(bert(2.0), tmp_path / "mine", push_to_hub=True, private=True, token="t", commit_message="c")
    assert calls["token"] == "t"
    assert calls["config"] == 2.0
    assert calls["create"] == ("mine", {"exist_ok": True, "private": True})
    assert calls["upload"]["repo_id"] == "me/mine"
    assert calls["upload"]["commit_message"] == "c"
    assert set(calls["upload"]["allow_patterns"]) == {"config.json", "model.safetensors", *CODE}


@pytest.mark.parametrize("there", [False, True])
def test_a_card_on_the_hub_stays(there, tmp_path, monkeypatch):
    import huggingface_hub

    uploaded = []

    class Api:
        def __init__(self, token=None): ...

        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def file_exists(self, repo_id, filename):
            assert (repo_id, filename) == ("me/mine", "README.md")
            return there

        def upload_folder(self, **options):
            uploaded.extend(options["allow_patterns"])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = patch_model(bert(1.0), "star")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert "config.json" in uploaded
    assert ("README.md" in uploaded) == (not there)
