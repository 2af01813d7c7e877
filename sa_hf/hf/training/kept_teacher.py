"""A teacher that ran in advance: of each token the classes that it finds most likely, on disk.

Rows are found by what the model is given, not by their number: shuffling, other batches and padding do not matter. A
folder holds ``index.json`` and shards: ``classes`` int32 and ``log_probs`` ``[tokens, k]``, ``rest`` fp32 ``[tokens]``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from sa_hf.errors import SparseAttentionError

TEACHER_INDEX = "index.json"
VERSION = 1
SHARD_TOKENS = 2**16  # 32 MB of 64 classes each
DTYPES = {"float32": torch.float32, "float16": torch.float16}
NOT_READ = frozenset({"labels", "attention_mask", "return_loss"})  # of a batch, by the teacher's distribution
PROBABILITIES_AT_ONCE = 2**22  # 16 MB in fp32


@dataclass(frozen=True, eq=False)
class KeptRows:
    """What a teacher found of the real tokens of a batch, one after the other: ``classes`` int64 and ``log_probs`` fp32
    ``[tokens, k]``, the most likely first, and ``rest`` fp32 ``[tokens]``, the log-probability of all others together;
    ``real [batch, length]`` says where those tokens stand."""

    classes: Tensor
    log_probs: Tensor
    rest: Tensor
    real: Tensor


class KeptTeacher:
    """Reads what :func:`keep_teacher` has written.

    Raises:
        SparseAttentionError: the folder holds no teacher, or that of a newer version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        about = _about(self.folder)
        if about is None:
            raise SparseAttentionError(
                f"{self.folder} holds no teacher ({TEACHER_INDEX}); write one by keep_teacher(...)"
            )
        self.vocab_size, self.top_k = int(about["vocab_size"]), int(about["top_k"])
        self._places: dict[str, list[int]] = about["rows"]
        self._shards: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def rows_of(self, inputs: Mapping[str, Any]) -> KeptRows:
        """What the teacher found of a batch, on the batch's device.

        Raises:
            SparseAttentionError: a row that the teacher has not seen.
        """
        real, keys = real_tokens(inputs), keys_of(inputs)
        found = []
        for number, key in enumerate(keys):
            if key not in self._places:
                raise SparseAttentionError(
                    f"row {number} of the batch is none of the {len(self)} that the teacher in {self.folder} has seen: "
                    "keep it for these rows, cut as they are here; rows that are masked or cropped at random at every "
                    "step need a live teacher (distill without a folder)"
                )
            shard, start, length = self._places[key]
            found.append([part[start : start + length] for part in self._shard(shard)])
        classes, log_probs, rest = (torch.cat(parts).to(real.device) for parts in zip(*found, strict=True))
        return KeptRows(classes.long(), log_probs.float(), rest, real)

    def _shard(self, number: int) -> tuple[Any, ...]:
        """The three tensors of a shard, mapped and not read."""
        if number not in self._shards:
            file = safe_open(self.folder / _shard_name(number), framework="pt")
            self._shards[number] = tuple(file.get_slice(name) for name in ("classes", "log_probs", "rest"))
        parts: tuple[Any, ...] = self._shards[number]
        return parts


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Which tokens of a batch are no padding, bool ``[batch, length]``."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise SparseAttentionError("a teacher on disk finds rows by their input_ids [batch, length], which are missing")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask.bool()
    return torch.ones_like(ids, dtype=torch.bool)


def keys_of(inputs: Mapping[str, Any]) -> list[str]:
    """A name for each row of a batch: of its real tokens, and of whatever else the model is given of it."""
    real, names = real_tokens(inputs), sorted(name for name in inputs if name not in NOT_READ)
    keys = []
    for row, kept in enumerate(real):
        total = hashlib.blake2b(digest_size=12)
        for name in names:
            value = inputs[name]
            if isinstance(value, Tensor) and value.dim() and len(value) == len(real):
                part = value[row][kept] if value.shape[:2] == real.shape else value[row]
                total.update(f"{name} {tuple(part.shape)}\0".encode() + part.cpu().contiguous().numpy().tobytes())
        keys.append(total.hexdigest())
    return keys


class Writer:
    """Adds rows to a folder, in shards: each is whole on the disk before the index names it.

    Args:
        known: what has to be the same for all rows of the folder.

    Raises:
        SparseAttentionError: the folder's rows are of another teacher, or kept otherwise.
    """

    def __init__(self, folder: Path, known: dict[str, Any]) -> None:
        self.folder, self.added = folder, 0
        self._waiting: list[KeptRows] = []
        self._lengths: dict[str, int] = {}
        self.about = _about(folder) or {"version": VERSION, **known, "vocab_size": 0, "shards": 0, "rows": {}}
        for name, value in known.items():
            if self.about[name] != value:
                raise SparseAttentionError(
                    f"{folder} holds a teacher with {name}={self.about[name]!r}, and this one has {value!r}: give "
                    "another folder"
                )

    def has(self, keys: Iterable[str]) -> bool:
        """Whether all these rows are there, or about to be written."""
        return all(key in self.about["rows"] or key in self._lengths for key in keys)

    def add(self, keys: list[str], rows: KeptRows, vocab_size: int) -> None:
        """The rows of a batch, by their keys."""
        self.about["vocab_size"] = vocab_size
        lengths = rows.real.sum(1).tolist()
        parts = zip(*(x.split(lengths) for x in (rows.classes, rows.log_probs, rows.rest)), rows.real, strict=True)
        for key, length, part in zip(keys, lengths, parts, strict=True):
            if not self.has([key]):
                self._lengths[key] = length
                self._waiting.append(KeptRows(*part))
                self.added += 1
        if sum(self._lengths.values()) >= SHARD_TOKENS:
            self.write()

    def write(self) -> None:
        """One shard of the rows that wait."""
        if not self._waiting:
            return
        number, start = int(self.about["shards"]), 0
        for key, length in self._lengths.items():
            self.about["rows"][key] = [number, start, length]
            start += length
        tensors = {
            "classes": torch.cat([rows.classes for rows in self._waiting]).int(),
            "log_probs": torch.cat([rows.log_probs for rows in self._waiting]).to(DTYPES[self.about["dtype"]]),
            "rest": torch.cat([rows.rest for rows in self._waiting]),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.folder / _shard_name(number))
        self.about["shards"] = number + 1
        part = self.folder / f"{TEACHER_INDEX}.part"
        part.write_text(json.dumps(self.about), "utf-8")
        part.replace(self.folder / TEACHER_INDEX)
        self._waiting, self._lengths = [], {}


def _about(folder: Path) -> dict[str, Any] | None:
    path = folder / TEACHER_INDEX
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if found.get("version") != VERSION:
        raise SparseAttentionError(f"{path} has version {found.get('version')!r}; this sa_hf reads {VERSION}")
    return found


def _shard_name(number: int) -> str:
    return f"teacher-{number:05d}.safetensors"


def most_likely(logits: Tensor, real: Tensor, top_k: int) -> KeptRows:
    """What is kept of a teacher's logits ``[batch, length, classes]``, on the CPU."""
    classes, log_probs, rest = [], [], []
    rows = logits[real]
    for some in rows.split(max(1, PROBABILITIES_AT_ONCE // rows.shape[1])):
        whole = log_softmax(some.float(), dim=-1)
        best = whole.topk(top_k, dim=-1)
        classes.append(best.indices.cpu())
        log_probs.append(best.values.cpu())
        rest.append(_rest(whole, best.indices).cpu())
    return KeptRows(torch.cat(classes), torch.cat(log_probs), torch.cat(rest), real.cpu())


def kept_divergence(student: Tensor, kept: KeptRows) -> Tensor:
    """``KL(teacher || student)`` of ``[batch, length, classes]``, fp32 scalar: the mean over real tokens, with the
    classes that are not kept taken as one. It is at most the whole one, and equals it where all classes are kept."""
    rows = student[kept.real]
    at_once = max(1, PROBABILITIES_AT_ONCE // rows.shape[1])
    total = rows.new_zeros((), dtype=torch.float32)
    parts = (x.split(at_once) for x in (rows, kept.classes, kept.log_probs, kept.rest))
    for some, classes, log_probs, rest in zip(*parts, strict=True):
        total = total + checkpoint(_summed_kept, some, classes, log_probs, rest, use_reentrant=False)
    return total / max(1, len(rows))


def _summed_kept(student: Tensor, classes: Tensor, log_probs: Tensor, rest: Tensor) -> Tensor:
    ours = log_softmax(student.float(), dim=-1)
    total = (log_probs.exp() * (log_probs - ours.gather(-1, classes))).sum()
    if classes.shape[1] < student.shape[1]:
        total = total + (rest.exp() * (rest - _rest(ours, classes))).sum()
    return total


def _rest(log_probs: Tensor, classes: Tensor) -> Tensor:
    """The log-probability of all classes but some, together, ``[tokens]``; -inf where there are no others."""
    return log_probs.scatter(-1, classes, float("-inf")).logsumexp(-1)


def fingerprint(teacher: nn.Module, skipped: Iterable[str]) -> str:
    """Twelve hexadecimal digits of a model's weights: of the sum and the shape of each, but for those with one of these
    words in their names. Wrappers do not matter."""
    names, sums = set(skipped), []
    for name, parameter in teacher.named_parameters():
        if not names.intersection(name.split(".")):
            sums.append(f"{tuple(parameter.shape)} {float(parameter.detach().double().sum()):.12e}")
    return hashlib.sha256("\n".join(sorted(sums)).encode()).hexdigest()[:12]
