"""``finetune --distill_teacher``: the dense teacher, run in advance over the training rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.data import collator
from sa_hf.tasks.ranks import say
from sa_hf.tasks.source import Rows


def check_teacher(args: argparse.Namespace) -> None:
    """Raise ``SparseAttentionError`` where the flags leave no rows that a teacher on disk could find again."""
    if args.distill_teacher is None:
        return
    if args.distill != "logits":
        raise SparseAttentionError(
            f"--distill_teacher keeps logits, and --distill is {args.distill}; nearest: --distill logits"
        )
    if args.task != "causal-lm":
        why = "masks other tokens at every step" if args.task == "masked-lm" else "has no logits of tokens"
        raise SparseAttentionError(f"--distill_teacher is for --task causal-lm: {args.task} {why}; leave it out")


def keep_for(args: argparse.Namespace, arguments: Any, model: Any, tokenizer: Any, rows: Rows) -> None:
    """Keep the teacher of the training rows where it is not kept yet.

    Raises:
        SparseAttentionError: the folder holds another teacher, or none and several processes would write it.
    """
    from torch.utils.data import DataLoader

    from sa_hf.hf.training.distillation import keep_teacher
    from sa_hf.hf.training.kept_teacher import TEACHER_INDEX

    folder = Path(args.distill_teacher)
    if arguments.world_size > 1:
        if not (folder / TEACHER_INDEX).exists():
            raise SparseAttentionError(
                f"--distill_teacher {folder} holds no teacher yet, and {arguments.world_size} processes would write "
                "it; run once in one process with --max_steps 1 first"
            )
        return
    data: Any = rows  # a sequence is data enough for a loader
    batches = DataLoader(data, batch_size=args.eval_batch_size, collate_fn=collator(args.task, tokenizer, args.seed))
    added = keep_teacher(model.to(arguments.device), batches, folder, top_k=args.distill_top_k)
    say(f"teacher: {added} of {len(rows)} training rows run dense and kept in {folder}")
