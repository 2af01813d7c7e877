"""The Trainer of a task, one for fine-tuning and evaluation: the same figures from both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sa_hf.hf.training.trainer import SparseTrainer
from sa_hf.tasks.data import collator
from sa_hf.tasks.masking import masked_once
from sa_hf.tasks.metrics import accuracy, share_interval
from sa_hf.tasks.questions import best_spans, span_figures
from sa_hf.tasks.source import FORECASTING, QUESTIONS, Rows
from sa_hf.tasks.synthetic import IGNORED

_TOKEN_LOSS = "token_loss"


class TaskTrainer(SparseTrainer):
    """A :class:`SparseTrainer` whose ``eval_loss`` is the mean over labelled tokens where rows have unequal numbers of
    them (masked language models), for any batch size and number of processes: a Trainer's own is one over batches."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics.pop(f"{metric_key_prefix}_{_TOKEN_LOSS}", None)
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output


def task_trainer(
    task: str, model: Any, arguments: Any, tokenizer: Any, train: Rows | None, evaluation: Rows, **options: Any
) -> TaskTrainer:
    """The Trainer of a task.

    Args:
        arguments: ``TrainingArguments``; their seed draws the masks of training.
        train, evaluation: rows as :func:`sa_hf.tasks.data.tokenize` gives them.
        options: of :class:`SparseTrainer`.
    """
    masked, questions = task == "masked-lm", task == QUESTIONS
    figures = _span_figures if questions else _Figures(shifted=task == "causal-lm")
    trainer = TaskTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=masked_once(evaluation, tokenizer) if masked else evaluation,
        data_collator=collator(task, tokenizer, arguments.seed),
        processing_class=tokenizer,
        compute_metrics=None if task == FORECASTING else figures,
        preprocess_logits_for_metrics=_spans if questions else _classes_and_losses if masked else _classes,
        **options,
    )
    if task != "causal-lm":
        # Most such heads take num_items_in_batch and ignore it: the loss of accumulated batches would be their sum.
        trainer.model_accepts_loss_kwargs = False
    return trainer


def _classes(logits: Any, labels: Tensor) -> Tensor:
    """The classes predicted: what is kept of the logits of a whole evaluation."""
    found: Tensor = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    return found


def _spans(logits: Any, labels: Any) -> Tensor:
    return best_spans(logits[0], logits[1])


def _span_figures(prediction: Any) -> dict[str, float]:
    starts, ends = prediction.label_ids
    spans, right = torch.as_tensor(prediction.predictions), torch.stack([*map(torch.as_tensor, (starts, ends))], 1)
    exact = (spans == right).all(1)
    return {**span_figures(spans, starts, ends), **_interval(exact, torch.ones_like(exact))}


def _classes_and_losses(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes, and each position's loss, 0 where there is no label."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    labelled = labels != IGNORED
    losses = torch.zeros(labels.shape, device=labels.device)
    losses[labelled] = cross_entropy(scores[labelled].float(), labels[labelled], reduction="none")
    return scores.argmax(-1), losses


def _interval(right: Tensor, counted: Tensor) -> dict[str, float]:
    """The accuracy's 95 % interval, see :func:`share_interval`; of ``[rows]`` or ``[rows, n]``."""
    rows = [x.reshape(len(x), -1).sum(1).tolist() for x in (right & counted, counted)]
    low, high = share_interval(rows[0], rows[1])
    return {"accuracy_low": low, "accuracy_high": high}


class _Figures:
    """``compute_metrics``: accuracy at the labelled positions with its interval, and their mean loss where the losses
    are there."""

    def __init__(self, shifted: bool) -> None:
        self.shifted = shifted

    def __call__(self, prediction: Any) -> dict[str, float]:
        given, labels = prediction.predictions, torch.as_tensor(prediction.label_ids)
        classes, losses = given if isinstance(given, tuple) else (given, None)
        classes = torch.as_tensor(classes)
        if self.shifted:
            classes, labels = classes[:, :-1], labels[:, 1:]
        figures = {"accuracy": accuracy(classes, labels), **_interval(classes == labels, labels != IGNORED)}
        if losses is not None:
            counted = int((labels != IGNORED).sum())
            figures[_TOKEN_LOSS] = float(torch.as_tensor(losses).double().sum()) / max(1, counted)
        return figures
