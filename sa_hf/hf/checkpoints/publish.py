"""Saving a model so that an interrupted save never leaves a folder that loads as something else.

Everything is written to a folder inside the target first. Then the target loses its ``config.json`` (without it no
load succeeds), takes the new files by renaming, and receives the new ``config.json`` last. Until the first of these
steps the old checkpoint is untouched; after the last the new one is whole.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from sa_hf.hf.checkpoints.card import CARD_FILE, card_text, is_ours, known_of
from sa_hf.hf.checkpoints.files import CONFIG_FILE, HEADER, REMOTE_FILE, SENTENCES_FILE, SPARSE_NAME, STAGE, stage_in


def save_whole(
    model: PreTrainedModel, save: Callable[..., Any], code: Callable[[], Mapping[str, str]], directory: Any,
    arguments: tuple[Any, ...], keywords: Mapping[str, Any],
) -> bool:  # fmt: skip
    """Run ``save`` (the model's own ``save_pretrained``) so that its files appear in ``directory`` all at once.

    Args:
        code: gives the code files that go with the weights, ``{name: text}``; called on the process that writes.
        directory, arguments, keywords: what the caller gave to ``save_pretrained``.

    Returns:
        Whether ``directory`` now holds a checkpoint that loads by its name alone, written by this process.
    """
    # A class's own may name none of them (Granite Speech).
    call = inspect.signature(PreTrainedModel.save_pretrained).bind(model, directory, *arguments, **keywords)
    call.apply_defaults()
    options = dict(call.arguments)
    options.pop("self")
    options.update(options.pop("kwargs", {}))
    target = Path(options.pop("save_directory"))
    whole = False
    adapter_alone = bool(getattr(model, "_hf_peft_config_loaded", False))
    if adapter_alone or target.is_file() or not _writes(model, options["is_main_process"]):
        save(target, **options)
    elif options.get("distributed_checkpoint", False):
        # Rank-local shards: every process writes its own into this folder, which serves resuming alone.
        target.mkdir(parents=True, exist_ok=True)
        _write_code(target, code())
        save(target, **options)
    else:
        push = bool(options.pop("push_to_hub"))
        hub = _hub_options(options) if push else {}
        names = _staged(save, code, target, options, str(getattr(model.config, "_name_or_path", "") or ""))
        whole = options.get("variant") is None
        if push:
            _upload(target, names, options.get("token"), hub)
    # Where the ranks have gathered the weights together, none may read them before they are in place.
    if hasattr(model, "barrier_after_gathered_checkpoint_save"):
        model.barrier_after_gathered_checkpoint_save(getattr(model.config, "distributed_config", None))
    return whole


def _writes(model: PreTrainedModel, is_main_process: bool) -> bool:
    """Whether this process writes, as Transformers decides it; the oldest versions go by the caller's word."""
    decide = getattr(model, "should_save_on_this_rank", bool)
    return bool(decide(is_main_process))


def _staged(
    save: Callable[..., Any], code: Callable[[], Mapping[str, str]], target: Path, options: dict[str, Any], origin: str
) -> list[str]:
    _remove_abandoned(target)
    with stage_in(target) as stage:
        files = code()
        _write_code(stage, files)  # before the weights: under FSDP2 the copying by Transformers itself breaks
        save(stage, **options)
        _name_architecture(stage / CONFIG_FILE)
        _write_card(stage, target, origin)
        if (target.parent / SENTENCES_FILE).is_file():
            # Transformers looks for the code of a ``subfolder=`` in the folder above.
            _write_code(target.parent, files)
        return publish(stage, target, options.get("variant"))


def _name_architecture(file: Path) -> None:
    """Say in a sparse checkpoint's ``architectures`` that its class is none of Transformers'.

    trl makes models of paths by the class of that name where Transformers has one, which is the dense one and runs no
    code of a checkpoint; else by the Auto class in ``auto_map``, as it should. (So do others: engines of inference.)
    """
    config = json.loads(file.read_text("utf-8"))
    names = config.get("architectures") or []
    if "sa_hf" in config:
        config["architectures"] = [SPARSE_NAME + name if hasattr(transformers, name) else name for name in names]
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_card(stage: Path, target: Path, origin: str) -> None:
    """A model card beside the weights, unless the target has one that is not ours.

    Args: origin: the name or folder that the model was loaded from, "" where it was not.
    """
    there = target / CARD_FILE
    sparse = "sa_hf" in json.loads((stage / CONFIG_FILE).read_text("utf-8"))
    if sparse and not (stage / CARD_FILE).exists() and (is_ours(there) or not there.exists()):
        (stage / CARD_FILE).write_text(card_text(stage, known_of(origin, there)), encoding="utf-8")


def publish(stage: Path, target: Path, variant: str | None = None) -> list[str]:
    """Move a whole checkpoint over whatever ``target`` holds; returns the names of its files."""
    names = sorted(path.name for path in stage.iterdir())
    (target / CONFIG_FILE).unlink(missing_ok=True)
    for path in _replaced(target, variant):
        if path.name not in names:
            path.unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == CONFIG_FILE):
        os.replace(stage / name, target / name)
    return names


def _replaced(target: Path, variant: str | None) -> list[Path]:
    """Files of an earlier checkpoint that would be read beside the new one: its weights, code, and our card."""
    part = rf"\.{re.escape(variant)}" if variant else ""
    weights = re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")
    return [
        path
        for path in filter(Path.is_file, target.iterdir())
        if weights.fullmatch(path.name) or _is_carried_code(path) or (path.name == CARD_FILE and is_ours(path))
    ]


def code_files(module: str, file: str) -> dict[str, str]:
    """The files that go with the weights of a model whose classes a module gives, ``{name: text}``; in a carried copy
    of this package the copy's own.

    Args: module, file: the ``__name__`` and ``__file__`` of that module.
    """
    if module.startswith("sa_hf."):
        from sa_hf.hf.checkpoints.flatten import carried_files  # which a carried copy has not

        return carried_files(module)
    folder = Path(file).parent
    remote = (folder / REMOTE_FILE).read_text("utf-8")
    names = [f"{name}.py" for name in sorted(set(re.findall(r"from \.(sa_hf_\w+) import", remote)))]
    return {REMOTE_FILE: remote, **{name: (folder / name).read_text("utf-8") for name in names}}


def _is_carried_code(path: Path) -> bool:
    if path.name != REMOTE_FILE and not re.fullmatch(r"sa_hf_\w+\.py", path.name):
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline() == HEADER


def _write_code(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _remove_abandoned(target: Path) -> None:
    """Delete what a killed save on this machine has left."""
    for stage in target.glob(f"{STAGE}*"):
        host, _, process = stage.name.removeprefix(STAGE).rpartition("-")
        if host == socket.gethostname() and process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(stage, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return process != os.getpid()


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("repo_id", "commit_message", "create_pr", "private")
    return {name: options.pop(name) for name in names if name in options}


def _upload(target: Path, names: list[str], token: Any, hub: dict[str, Any]) -> None:
    """What ``save_pretrained(push_to_hub=True)`` does, after the files are safe here.

    A card on the hub stays: it may be somebody's own.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(hub.pop("repo_id", target.name), exist_ok=True, private=hub.pop("private", None)).repo_id
    hub.setdefault("commit_message", "Upload model")
    if CARD_FILE in names and api.file_exists(repo_id, CARD_FILE):
        names = [name for name in names if name != CARD_FILE]
    api.upload_folder(repo_id=repo_id, folder_path=target, allow_patterns=names, **hub)
