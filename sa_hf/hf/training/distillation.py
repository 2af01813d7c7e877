"""Recovery by the model's own dense attention: a teacher that is the same model, and the distance to what it gives.

The teacher runs inside ``dense(model)`` with the weights of before the training: where adapters alone (or learned
sparse state) train, that is the model itself with its adapters off, else a frozen copy of it. Or it ran in advance
(:func:`keep_teacher`), and its most likely classes are read from disk: training then has no dense pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, mse_loss
from torch.utils.checkpoint import checkpoint

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.patching.patch import dense
from sa_hf.hf.state.patch import required_patch
from sa_hf.hf.state.sites import root_model
from sa_hf.hf.state.step import IGNORED_LABEL
from sa_hf.hf.training.kept_teacher import (
    DTYPES,
    KeptRows,
    KeptTeacher,
    Writer,
    fingerprint,
    kept_divergence,
    keys_of,
    most_likely,
    real_tokens,
)

DISTILL = ("logits", "outputs", "both")
NUMBERS_AT_ONCE = 2**22  # 16 MB in fp32: log-probabilities of a large vocabulary are made in pieces of about so many

Outputs: TypeAlias = list[tuple[str, Tensor]]  # of attention layers, by name
# A teacher's logits by name, or what was kept of them, and outputs.
Taught: TypeAlias = tuple[dict[str, Tensor] | KeptRows, Outputs]


class Distillation:
    """A teacher beside a patched model in training, and the loss against it.

    Args:
        model: a patched model, perhaps with adapters of PEFT; its weights now are the teacher's.
        what: "logits" (KL divergence to the teacher's distribution; of one number the squared error), "outputs" (the
            squared error of each attention layer's output over a sequence, relative to the teacher's) or "both", which
            are added.
        kept: a teacher on disk, of the logits of tokens; None runs the model's own.

    Raises:
        SparseAttentionError: the model is not patched, ``what`` is none of these, or not what is kept.
    """

    def __init__(self, model: nn.Module, what: str, kept: KeptTeacher | None = None) -> None:
        if what not in DISTILL:
            raise SparseAttentionError(f"distill={what!r} must be None or one of {DISTILL}; nearest: 'logits'")
        if kept is not None and what != "logits":
            raise SparseAttentionError(
                f"distill={what!r} compares the outputs of layers, and {kept.folder} holds logits alone; use "
                "distill='logits', or no folder"
            )
        self.what, self.kept = what, kept
        root = root_model(model)
        patch = required_patch(root, f"SparseTrainer(distill={what!r})")
        self.in_decoder = {site.name: site.spec.causal for site in patch.sites.all_sites}
        self.encodes_and_decodes = bool(getattr(root.config, "is_encoder_decoder", False))
        self.frozen: nn.Module | None = None
        if kept is None and _trains_weights(model):
            self.frozen = copy.deepcopy(model).requires_grad_(False).eval()
        self.figures: dict[str, float] = {}

    def teach(self, model: nn.Module, inputs: Mapping[str, Any]) -> Taught:
        """What the teacher gives for a batch: its logits by name, and of each attention layer its name and output
        ``[batch, length, hidden]`` (each empty where it is not asked for).

        Raises:
            SparseAttentionError: the model gives no logits, and these are to be distilled; or a teacher on disk has
                not seen a row.
        """
        if self.kept is not None:
            return self.kept.rows_of(inputs), []
        teacher = model if self.frozen is None else self.frozen
        if self.frozen is not None:
            device = next(model.parameters()).device
            if next(teacher.parameters()).device != device:
                teacher.to(device)
        given = dict(inputs)
        if not self.encodes_and_decodes:  # whose decoder reads its labels
            given.pop("labels", None)
        with torch.no_grad(), _at_rest(teacher), dense(teacher), self.outputs_of(teacher) as outputs:
            answer = teacher(**given)
        logits = logits_in(answer) if self.what != "outputs" else {}
        if self.what != "outputs" and not logits:
            raise SparseAttentionError(
                f"{type(root_model(model)).__name__} gives no logits, so distill={self.what!r} has nothing to compare; "
                "use distill='outputs'"
            )
        return logits, outputs

    @contextmanager
    def outputs_of(self, model: nn.Module) -> Iterator[Outputs]:
        """Inside the block the names and outputs of the attention layers gather in the list, in the order of their
        calls; none where logits alone are distilled."""
        found: Outputs = []
        if self.what == "logits":
            yield found
            return
        root = root_model(model)

        def note(name: str, output: Any) -> None:
            found.append((name, output[0] if isinstance(output, tuple) else output))

        handles = [
            root.get_submodule(name).register_forward_hook(lambda _m, _a, output, name=name: note(name, output))
            for name in self.in_decoder
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, answer: Any, outputs: Outputs, taught: Taught, inputs: Mapping[str, Any]) -> Tensor:
        """The distance to the teacher, an fp32 scalar: means over the tokens that are no padding, and over layers."""
        of_encoder, of_decoder = self._real_tokens(inputs)
        parts: dict[str, Tensor] = {}
        if isinstance(taught[0], KeptRows):
            parts["distill_logits"] = kept_divergence(self._tokens_of(answer, taught[0]), taught[0])
        elif taught[0]:
            student = logits_in(answer)
            each = [divergence_of(student[name], logits, of_decoder) for name, logits in taught[0].items()]
            parts["distill_logits"] = torch.stack(each).mean()
        if taught[1]:
            if any(not x.requires_grad for _, x in outputs):
                raise SparseAttentionError(
                    "distill='outputs' reads layers that run without a graph (reentrant gradient checkpointing, or "
                    "frozen layers alone); use gradient_checkpointing_kwargs={'use_reentrant': False}, or 'logits'"
                )
            each = [
                error_of(x, y, of_decoder if self.in_decoder[name] else of_encoder)
                for (name, x), (_, y) in zip(outputs, taught[1], strict=True)
            ]
            parts["distill_outputs"] = torch.stack(each).mean()
        self.figures = {name: float(value.detach()) for name, value in parts.items()}
        total: Tensor = torch.stack(list(parts.values())).sum()
        return total

    def _tokens_of(self, answer: Any, kept: KeptRows) -> Tensor:
        """The student's logits ``[batch, length, classes]`` of the tokens that were kept."""
        logits, size = logits_in(answer).get("logits"), self.kept.vocab_size if self.kept is not None else 0
        if logits is None or logits.shape != (*kept.real.shape, size):
            found = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise SparseAttentionError(
                f"the model gives {found}, and its teacher on disk is of {tuple(kept.real.shape)} tokens and {size} "
                "classes; keep the teacher of this model"
            )
        return logits

    def _real_tokens(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens of the encoder and of the decoder are no padding, bool ``[batch, length]``; None: not said. A
        model of one stack has the same for both."""
        mask = inputs.get("attention_mask")
        given = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if not self.encodes_and_decodes:
            return given, given
        labels, mask = inputs.get("labels"), inputs.get("decoder_attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return given, mask.bool()
        return given, labels != IGNORED_LABEL if isinstance(labels, Tensor) and labels.dim() == 2 else None


@torch.no_grad()
def keep_teacher(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], folder: str | Path, *, top_k: int = 64,
    dtype: str = "float32",
) -> int:  # fmt: skip
    """Run the dense teacher of a patched model once over the training data, and keep what it finds most likely.

    ``SparseTrainer(distill="logits", teacher=folder)`` then trains without a dense pass. A row that is kept already is
    not run again, so that a call that was cut off goes on.

    Args:
        model: as it is before the training; adapters of PEFT are off.
        batches: as the trainer gives them to the model: ``trainer.get_train_dataloader()``.
        top_k: classes per token; all others count as one. 64 take 516 bytes a token, 388 in "float16".
        dtype: of the log-probabilities: "float32" or "float16".

    Returns:
        How many rows were added.

    Raises:
        SparseAttentionError: the model is not patched, is an encoder-decoder or gives no logits of tokens, an option is
            out of its range, or the folder holds another teacher.
    """
    root = root_model(model)
    required_patch(root, "keep_teacher")
    if dtype not in DTYPES:
        raise SparseAttentionError(f"dtype={dtype!r} must be one of {sorted(DTYPES)}; nearest: 'float32'")
    if getattr(root.config, "is_encoder_decoder", False):
        raise SparseAttentionError(
            f"{type(root).__name__} gives logits of its labels' tokens, and rows on disk are found by input_ids; use a "
            "live teacher (no folder)"
        )
    device = next(model.parameters()).device
    weights = fingerprint(model, {"sparse", *(getattr(model, "peft_config", None) or ())})
    writer = Writer(Path(folder), {"top_k": top_k, "dtype": dtype, "weights": weights})
    with _at_rest(model), dense(model):
        for batch in batches:
            given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
            keys = keys_of(given)
            if writer.has(keys):
                continue
            logits, real = logits_in(model(**given)).get("logits"), real_tokens(given)
            if logits is None or logits.dim() != 3 or logits.shape[:2] != real.shape:
                raise SparseAttentionError(f"{type(root).__name__} gives no logits of tokens; use a live teacher")
            if not 1 <= top_k <= logits.shape[2]:
                raise SparseAttentionError(
                    f"top_k={top_k} must lie in [1, {logits.shape[2]}]; nearest: {min(max(1, top_k), logits.shape[2])}"
                )
            writer.add(keys, most_likely(logits, real, top_k), logits.shape[2])
    writer.write()
    return writer.added


def _trains_weights(model: nn.Module) -> bool:
    """Whether anything trains but adapters and learned sparse state."""
    adapters = set(getattr(model, "peft_config", None) or ())
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if parameter.requires_grad and "sparse" not in words and not adapters.intersection(words):
            return True
    return False


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Inside the block the model evaluates, its adapters off; then each module trains as before."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        disable = getattr(model, "disable_adapter", None)  # PEFT's wrapper
        if disable is not None:
            stack.enter_context(disable())
        elif getattr(model, "_hf_peft_config_loaded", False):  # an adapter added to the model itself
            model.disable_adapters()  # type: ignore[operator]
            stack.callback(model.enable_adapters)  # type: ignore[arg-type]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def logits_in(answer: Any) -> dict[str, Tensor]:
    """The logits of a model's output by name: ``logits``, or those of spans (``start_logits``, ``end_logits``)."""
    if not isinstance(answer, Mapping):
        return {}
    return {name: x for name, x in answer.items() if name.endswith("logits") and isinstance(x, Tensor)}


def divergence_of(student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
    """``KL(teacher || student)``, fp32 scalar: the mean over tokens (or sequences) of logits ``[..., classes]``; of
    spans ``[batch, length]`` over the real positions; of one number the squared error."""
    if student.shape[-1] == 1:
        return mse_loss(student.float(), teacher.float())
    if real is not None and student.dim() == 2 and student.shape == real.shape:  # a choice among the positions
        lowest = torch.finfo(torch.float32).min
        student, teacher = (x.float().masked_fill(~real, lowest) for x in (student, teacher))
    elif real is not None and student.dim() == 3 and student.shape[:2] == real.shape:
        student, teacher = student[real], teacher[real]
    rows = student.reshape(-1, student.shape[-1])
    targets = teacher.reshape(-1, teacher.shape[-1])
    at_once = max(1, NUMBERS_AT_ONCE // rows.shape[1])
    total = rows.new_zeros((), dtype=torch.float32)
    for some, wanted in zip(rows.split(at_once), targets.split(at_once), strict=True):
        # Nothing but the logits is kept for backward.
        total = total + checkpoint(_summed_divergence, some, wanted, use_reentrant=False)
    return total / max(1, len(rows))


def _summed_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = (log_softmax(x.float(), dim=-1) for x in (student, teacher))
    return kl_div(ours, theirs, reduction="sum", log_target=True)


def error_of(student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
    """The squared error of ``[batch, length, hidden]`` over that of 0, fp32 scalar: the mean over sequences. The
    student may have extra tokens in front, which the teacher knows nothing of."""
    student, wanted = student[:, student.shape[1] - teacher.shape[1] :].float(), teacher.float()
    if real is not None and real.shape == teacher.shape[:2]:
        student, wanted = (x * real[..., None] for x in (student, wanted))
    of_rows = (student - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2)).clamp(min=1e-12)
    return of_rows.mean()
