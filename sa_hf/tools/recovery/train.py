"""One training of the grid by ``SparseTrainer``, which stops at each step that is measured."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import IterableDataset

from sa_hf import freeze_masks, patch_model, prepare_peft
from sa_hf.hf.training.trainer import SparseTrainer
from sa_hf.tools.recovery.encoder import contrastive_loss, embedded
from sa_hf.tools.recovery.grid import DENSE, FROZEN_AFTER, Assigned, Method

WARM = 10  # steps until the rate is whole; it stays, so that step 30 of a long run is that of a short one
LORA_RANK = 16
Batch = dict[str, Tensor]


class Stream(IterableDataset[Batch]):
    """Whole batches one after the other, as the trainer's data."""

    def __init__(self, batches: Callable[[], Iterator[Batch]], count: int) -> None:
        self.batches, self.count = batches, count

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(self.batches(), self.count)


class EmbeddingTrainer(SparseTrainer):
    """Trains an encoder to find each document by its query; the teacher's outputs are those on the documents."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # fmt: skip
        """The contrastive loss, and the distance to the teacher where there is one; a pattern's auxiliary losses come
        along with the states that it is made of."""
        documents = {"input_ids": inputs["documents"]}
        queries = embedded(model, inputs["queries"])
        if self.distillation is None:
            loss = contrastive_loss(queries, embedded(model, documents["input_ids"]))
        else:
            taught = self.distillation.teach(self.model, documents)
            with self.distillation.outputs_of(self.model) as outputs:
                found = embedded(model, documents["input_ids"])
            distance = self.distillation.loss(None, outputs, taught, documents)
            loss = contrastive_loss(queries, found) + self.distill_weight * distance
        return (loss, {"loss": loss}) if return_outputs else loss


class AtSteps(transformers.TrainerCallback):
    """Calls ``measure(step, model)`` in evaluation mode after the steps that are wanted."""

    def __init__(self, steps: Sequence[int], measure: Callable[[int, Any], None]) -> None:
        self.steps, self.measure = frozenset(steps), measure

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            model.eval()
            self.measure(state.global_step, model)
            model.train()


class Freezing(transformers.TrainerCallback):
    """Fixes the learned masks after a step: with the same outputs in evaluation, and from there on without a search."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.after:
            freeze_masks(model)


def sparse(model: Any, pattern: str, assigned: Assigned) -> Any:
    """The model with its pattern; the dense one as it is."""
    return model if pattern == DENSE else patch_model(model, assigned)


def train(
    model: Any,
    pattern: str,
    method: Method,
    batches: Callable[[], Iterator[Batch]],
    steps: Sequence[int],
    seed: int,
    measure: Callable[[int, Any], None],
    *,
    embeddings: bool,
) -> None:
    """Train a model that already has its pattern, and call ``measure(step, model)`` at each of ``steps``.

    Args:
        batches: a fresh iterator of whole batches: what the model takes, or queries and documents (``embeddings``).
        seed: of adapters' first weights; the batches have their own.
    """
    torch.manual_seed(seed)
    if method.lora:
        import peft

        config: Any = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
        model = peft.get_peft_model(model, config if pattern == DENSE else prepare_peft(config, model))
    on_cpu = next(model.parameters()).device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=max(steps), learning_rate=method.rate, lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARM, weight_decay=0.01, use_cpu=on_cpu, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_steps=10, remove_unused_columns=False, per_device_train_batch_size=1, seed=seed,
            accelerator_config={"dispatch_batches": False},
        )  # fmt: skip
        trainer_class = EmbeddingTrainer if embeddings else SparseTrainer
        trainer = trainer_class(
            model, arguments, train_dataset=Stream(batches, max(steps)), data_collator=lambda rows: rows[0],
            distill=method.distill, distill_weight=method.weight,
        )  # fmt: skip
        trainer.add_callback(AtSteps(steps, measure))
        if pattern in FROZEN_AFTER:
            trainer.add_callback(Freezing(FROZEN_AFTER[pattern]))
        trainer.train()
