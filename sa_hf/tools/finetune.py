"""Fine-tune a Transformers model with sparse attention on long inputs, save it, and prove that it loads as trained.

    sa-hf finetune --model minilm --pattern bigbird --set block_size=32 --task masked-lm --max_length 1024
    accelerate launch --config_file scripts/accelerate/ddp_cpu.yaml scripts/finetune.py --pattern bigbird

Every flag can stand in a YAML file (--config) under its own name, "set" and "model_set" as mappings; flags win.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa_hf.config import available_patterns, did_you_mean, shown
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.assignment import with_configs
from sa_hf.tasks.data import tokenize
from sa_hf.tasks.flags import FlagParser, add_data_flags, devices, json_text, parse_flags, real, source_of, steps, whole
from sa_hf.tasks.forecast import forecast_figures
from sa_hf.tasks.models import (
    CONV_TRANS,
    TOYS,
    check_length,
    check_model,
    load_for_task,
    load_tokenizer,
    trained_classes,
)
from sa_hf.tasks.ranks import is_main, quiet_others, say
from sa_hf.tasks.resume import check_checkpoint
from sa_hf.tasks.source import SUMMARIES, Rows
from sa_hf.tasks.summaries import summary_figures
from sa_hf.tasks.verify import required_peft, verify_reload
from sa_hf.tools.options import make_config, parse_options
from sa_hf.tools.teacher import check_teacher, keep_for

VERIFIED_ROWS = 2
LABELS = ("labels", "start_positions", "end_positions")
DISTILL = ("logits", "outputs", "both")  # of SparseTrainer, whose module takes seconds to import
# Words in the names of the schedulers that fail without options.
NEEDS_OPTIONS = frozenset({"plateau", "decay", "min"})


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = FlagParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of flags")
    _add_model_flags(parser)
    add_data_flags(parser)
    _add_training_flags(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("model and pattern")
    what.add_argument(
        "--model",
        "--model_name_or_path",
        default="minilm",
        help=f"hub name, folder, 'minilm' (embedded), a toy: {', '.join(TOYS)}, or {CONV_TRANS}",
    )
    what.add_argument(
        "--model_set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the model's config"
    )
    what.add_argument(
        "--trust_remote_code", action="store_true", help="let the hub model named by --model run its own code"
    )
    what.add_argument(
        "--pattern", default="bigbird", help=f"one of: {', '.join(available_patterns())}; 'none' leaves the model"
    )
    what.add_argument("--preset", help="a named preset of the pattern")
    what.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an option of the pattern")
    what.add_argument("--layers", help='layers that get the pattern, e.g. "0-3,6" (default: all)')
    what.add_argument("--engine", default="auto", help="auto, or the engine that must run")
    what.add_argument("--rope_parameters", type=json_text, help="JSON of RoPE scaling for a lengthened model")
    what.add_argument(
        "--lora_rank",
        "--lora_r",
        type=whole(0),
        default=0,
        help="train LoRA adapters of this rank on all linear layers (0: off)",
    )


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("training")
    run.add_argument("--output_dir", default="runs/finetune")
    run.add_argument("--epochs", "--num_train_epochs", type=real(0, above=True), default=1.0)
    run.add_argument("--max_steps", type=steps, default=-1, help="steps instead of epochs, >= 1 (default: -1, epochs)")
    run.add_argument("--batch_size", "--per_device_train_batch_size", type=whole(1), default=1)
    run.add_argument("--eval_batch_size", "--per_device_eval_batch_size", type=whole(1), default=1)
    run.add_argument("--gradient_accumulation", "--gradient_accumulation_steps", type=whole(1), default=1)
    run.add_argument("--lr", "--learning_rate", type=real(0), default=5e-5)
    run.add_argument("--sparse_lr", type=real(0), default=1e-2, help="learning rate of masks and spans")
    run.add_argument(
        "--distill",
        choices=DISTILL,
        help="also follow the model's own dense attention: its logits, each attention layer's output, or both",
    )
    run.add_argument("--distill_weight", type=real(0), default=1.0, help="weight of the distance to it")
    run.add_argument(
        "--distill_teacher", metavar="FOLDER", help="run the teacher once in advance and keep its logits here: no "
        "dense pass in training (causal-lm, --distill logits)",
    )  # fmt: skip
    run.add_argument("--distill_top_k", type=whole(1), default=64, help="classes per token that are kept there")
    run.add_argument("--weight_decay", type=real(0), default=0.01)
    run.add_argument(
        "--warmup_steps", "--warmup_ratio", type=real(0), default=0.1, help="steps, or below 1 a share of all steps"
    )
    run.add_argument("--scheduler", "--lr_scheduler_type", default="linear", choices=schedulers())
    run.add_argument("--bf16", action="store_true")
    run.add_argument("--gradient_checkpointing", "--activation_checkpointing", action="store_true")
    run.add_argument("--logging_steps", type=whole(1), default=10)
    run.add_argument("--eval_steps", type=whole(1), help="evaluate every so many steps (default: at the end)")
    run.add_argument(
        "--save_steps", type=whole(1), help="keep a checkpoint every so many steps (default: the end alone)"
    )
    run.add_argument(
        "--resume", "--resume_from_checkpoint", help='a checkpoint folder, or "auto" for the newest in --output_dir'
    )
    run.add_argument("--report_to", default="none", help="tensorboard, wandb, ...")
    run.add_argument("--cpu", "--use_cpu", action="store_true", help="stay on the CPU")
    run.add_argument(
        "--verify", default="fresh", choices=("fresh", "same", "none"), help="reload in a fresh or in this process"
    )


def schedulers() -> list[str]:
    """What --scheduler takes: those of Transformers that need no options of their own."""
    from transformers.trainer_utils import SchedulerType

    return [kind.value for kind in SchedulerType if not NEEDS_OPTIONS.intersection(kind.value.split("_"))]


def parse_arguments(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    return parse_flags(build_parser(prog), argv, pairs=("set", "model_set", "dataset_set"), mappings=("pattern",))


def chosen_pattern(args: argparse.Namespace) -> Any:
    """The config that --pattern, --preset and --set describe; a mapping from a YAML file with its configs built."""
    if isinstance(args.pattern, dict):
        if args.set or args.preset or args.layers:
            raise SparseAttentionError("a mapping as pattern holds its own options: leave out set, preset and layers")
        return with_configs(args.pattern)
    return make_config(args.pattern, args.set, args.preset)


def prepare(args: argparse.Namespace) -> tuple[Any, Any, tuple[Rows, Rows]]:
    """The patched model, its tokenizer, and the rows to train and to evaluate on.

    What is wrong with pattern or data comes before the model is loaded.
    """
    import sa_hf

    if args.pattern != "none":
        chosen_pattern(args)
    elif args.set or args.preset or args.layers:
        raise SparseAttentionError("--set, --preset and --layers say how to patch, but --pattern none leaves the model")
    if args.lora_rank:
        required_peft("--lora_rank")
    check_model(args.model, args.task, args.trust_remote_code)
    source = source_of(
        args,
        fields=parse_options(args.dataset_set),
        label2id=trained_classes(args.model, args.task, args.trust_remote_code),
    )
    if source.vocab_size is not None and args.model not in TOYS:
        raise SparseAttentionError(f"dataset {args.dataset!r} has token ids of its own: use --model with one of {TOYS}")
    options = {**(source.model_options or {}), **parse_options(args.model_set)}
    if args.model == CONV_TRANS and args.pattern != "none":
        options["attention"] = chosen_pattern(args)
    rows = tokenize(
        source, args.task, load_tokenizer(args.model, args.max_length), args.max_length, args.train_rows, args.eval_rows
    )
    model, tokenizer = load_for_task(
        args.model,
        args.task,
        max_length=args.max_length,
        labels=source.labels,
        vocab_size=source.vocab_size,
        model_options=options,
        trust_remote_code=args.trust_remote_code,
    )
    if args.pattern == "none" or args.model == CONV_TRANS:
        if args.model != CONV_TRANS:
            check_length(model, args.max_length)
        return model, tokenizer, rows
    from sa_hf.hf.state.positions import lengthening

    sa_hf.patch_model(
        model,
        chosen_pattern(args),
        layers=args.layers,
        max_length=lengthening(model, args.max_length),
        tokenizer=tokenizer,
        rope_parameters=args.rope_parameters,
        engine=args.engine,
    )
    if not isinstance(args.pattern, dict) and is_main():
        print(sa_hf.summary(model, args.max_length))
    return model, tokenizer, rows


def check_reports(name: str) -> None:
    """Raise ``SparseAttentionError`` where Transformers has no integration of this name, or its package is missing."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise SparseAttentionError(
            f"--report_to {shown(name)} is unknown{did_you_mean(name, INTEGRATION_TO_CALLBACK)}; give none, all, or "
            f"one of: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
        )
    if name not in get_available_reporting_integrations():
        raise SparseAttentionError(f"--report_to {name} needs a package that is not installed; nearest: none")


def training_arguments(args: argparse.Namespace) -> Any:
    from transformers import TrainingArguments

    # Transformers 5.23 calls it activation_checkpointing and warns; the older name serves the whole supported range.
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        **(checkpointing if args.gradient_checkpointing else {}),
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup_steps,
        lr_scheduler_type=args.scheduler,
        seed=args.seed,
        bf16=args.bf16,
        logging_steps=args.logging_steps,
        eval_strategy="steps" if args.eval_steps else "no",
        eval_steps=args.eval_steps,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        report_to=args.report_to,
        **devices(args.cpu),
        remove_unused_columns=False,
        prediction_loss_only=args.task == "forecasting",
        # Buffers of learned patterns are equal on all ranks already, or gathered by their own reduction.
        ddp_broadcast_buffers=False,
    )


def with_lora(model: Any, rank: int, base_folder: Path, is_main: bool) -> Any:
    """The model with LoRA on all linear layers; its patched base is saved where the adapter will point to."""
    import sa_hf

    peft = required_peft("--lora_rank")
    if is_main:
        model.save_pretrained(base_folder)
    # With a task PEFT trains and saves the new head, too, and AutoPeftModelForSequenceClassification finds it.
    heads = {"ForSequenceClassification": "SEQ_CLS", "ForQuestionAnswering": "QUESTION_ANS"}
    task = next((kind for head, kind in heads.items() if type(model).__name__.endswith(head)), None)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)
    return peft.get_peft_model(model, sa_hf.prepare_peft(config, model))


def train(
    args: argparse.Namespace, model: Any, tokenizer: Any, data: tuple[Rows, Rows], checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train, evaluate, save and verify; returns the metrics."""
    from sa_hf.hf.checkpoints.card import CARD_FILE, METRICS_FILE, is_ours
    from sa_hf.tasks.measure import StepClock, peak_memory_mb
    from sa_hf.tasks.trainer import task_trainer
    from sa_hf.tools import stopping
    from sa_hf.tools.card import renew_card

    arguments = training_arguments(args)
    output = Path(args.output_dir)
    if args.lora_rank:
        model = with_lora(model, args.lora_rank, output / "base", arguments.process_index == 0)
    rows, evaluation = data
    options = {"sparse_lr": args.sparse_lr, "distill": args.distill, "distill_weight": args.distill_weight}
    if args.distill_teacher is not None:
        keep_for(args, arguments, model, tokenizer, rows)
        options["teacher"] = args.distill_teacher
    trainer = task_trainer(args.task, model, arguments, tokenizer, rows, evaluation, **options)
    clock = StepClock()
    trainer.add_callback(clock)
    stop = stopping.StopAndSave()
    trainer.add_callback(stop)
    trainer.add_callback(stopping.NoStepTooMany())
    metrics: dict[str, Any] = {}
    try:
        with stopping.writing(output), stop.listening(arguments.world_size):
            metrics |= trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    except stopping.AtItsEnd:
        say(f"{checkpoint} is at step {trainer.state.global_step} of --max_steps {args.max_steps}: no step is left")
    stopping.end_if_stopped(stop, output, trainer.state.global_step)
    metrics |= {**clock.figures(), "global_step": trainer.state.global_step}
    # Saved before all else: what goes wrong from here on loses no training.
    with stopping.writing(output), stop.listening(arguments.world_size, stopping.SAVING):
        trainer.save_model()
    stopping.end_if_saved(stop, output)
    metrics |= {"train_peak_memory_mb": peak_memory_mb(), **trainer.evaluate()}
    if args.task == "forecasting":
        metrics |= forecast_figures(trainer.accelerator.unwrap_model(trainer.model), evaluation)
    if args.task == SUMMARIES:
        metrics |= summary_figures(trainer.accelerator.unwrap_model(trainer.model), tokenizer, evaluation)
    if arguments.process_index == 0:
        if args.verify != "none":
            trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            batch = trainer.data_collator(list(evaluation[:VERIFIED_ROWS]))
            batch = {k: v for k, v in batch.items() if k not in LABELS}
            verify_reload(trained, output, args.task, batch, fresh=args.verify == "fresh")
            metrics["reload_verified"] = True
        metrics["log"] = trainer.state.log_history
        (output / METRICS_FILE).write_text(json.dumps({"arguments": vars(args), **metrics}, indent=2) + "\n")
        if is_ours(output / CARD_FILE):
            renew_card(output)  # the figures are known now
    trainer.accelerator.wait_for_everyone()
    return metrics


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Train, evaluate, save and verify as the flags say; print the metrics and return them.

    Args:
        argv: the flags; None takes those of the command line.
        prog: the command's name in its help.

    Raises:
        SparseAttentionError: a flag, the data or the model does not fit.
        OSError: a file or folder cannot be read or written.
        SystemExit: 130, Ctrl-C ended the training, and a checkpoint holds where it was; or it ended the run in its last
            save, which is whole.
    """
    from transformers import set_seed

    from sa_hf.tools.stopping import check_output, checkpoint_to_resume

    args = parse_arguments(argv, prog)
    quiet_others()
    set_seed(args.seed)
    check_reports(args.report_to)
    check_teacher(args)
    check_output(Path(args.output_dir))
    checkpoint = checkpoint_to_resume(args.resume, Path(args.output_dir))
    model, tokenizer, data = prepare(args)
    if checkpoint is not None:
        check_checkpoint(checkpoint, model, args.lora_rank)
        say(f"going on from {checkpoint}")
    elif args.resume is not None:
        say(f"no checkpoint in {args.output_dir}: beginning anew")
    metrics = train(args, model, tokenizer, data, checkpoint)
    if is_main():
        print(json.dumps({k: v for k, v in metrics.items() if k != "log"}, indent=2))
    return metrics
