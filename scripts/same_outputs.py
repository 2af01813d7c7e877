"""Whether two builds of sa_hf give the same bits on this CPU: outputs and all gradients of every pattern.

    python scripts/same_outputs.py --against REV          # this checkout and a git revision; exit 1 where they differ
    python scripts/same_outputs.py --out now.json         # sha256 of each tensor, by case
    python scripts/same_outputs.py --compare a.json b.json

A refactoring shows with it that it changed nothing (with ``same_speed.py``: not the time either). Only public names are
used, so that old revisions run it, too; they run in a worktree of their own. fp64 cases and a second run with
SA_HF_CPU_KERNELS=0 (``--torch``) are of torch's operators, whose sums may be in another order on purpose: they are
compared by ``--torch`` alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

STATIC: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "sliding_window": [{"window": 10}, {"window": 100, "num_sink_tokens": 3, "drop_diagonal": True}],
    "longnet": [
        {"segment_length": (16, 32, 128), "dilated_ratio": (1, 2, 4)},
        {"segment_length": (8, 21, 50), "dilated_ratio": (1, 3, 4), "head_offset": "grouped"},
    ],
    "logsparse": [{}, {"local_window": 3, "restart_length": 10}],
    "sparse_transformer": [
        {"kind": "strided", "stride": 10},
        {"kind": "strided", "stride": 16, "head_mode": "per_head"},
        {"kind": "fixed", "stride": 64, "summary": 16},
        {"kind": "fixed", "stride": 12, "summary": 2, "num_summary_groups": 2, "head_mode": "interleaved"},
    ],
    "bigbird": [{"block_size": 16}, {"block_size": 64, "global_blocks": "first", "drop_diagonal": True}],
    "star": [{}, {"ring": False}],
}
# (batch, query heads, key heads, queries, keys, head_dim)
SHAPES = [(1, 4, 4, 200, 200, 16), (2, 4, 2, 333, 333, 24), (1, 4, 1, 70, 190, 40)]
MODELS: dict[str, Any] = {
    "sparsebert": {"mask_length": 64},
    "sparsebert frozen": {"mask_length": 64},
    "sparsebert unstructured": {"mask_length": 192, "structure": "unstructured"},
    "expire_span": {"max_span": 40, "ramp": 8},
    "expire_span by head": {"max_span": 60, "ramp": 16, "per_head": True, "initial_span": 20.0},
    "routing": {"num_clusters": 4, "window": 12, "num_local_heads": 1, "local_window": 16},
    "routing shared": {"num_clusters": 3, "window": 20, "shared_qk": True, "drop_diagonal": False},
    "bigbird": {"block_size": 16},
    "logsparse": {"local_window": 3},
    "logsparse convolution": {"conv_kernel_size": 3},
    "longnet": {"segment_length": (16, 64), "dilated_ratio": (1, 2)},
    "sliding_window": {"window": 9, "num_sink_tokens": 2},
    "star": {},
    "star virtual": {"relay": "virtual"},
    "mixture": {
        "heads": {"0-1": {"name": "bigbird", "block_size": 16}, "2-3": {"name": "sliding_window", "window": 7}}
    },
}


def digest(x: Tensor | None) -> str:
    """The bits of a tensor, its shape and dtype."""
    if x is None:
        return "none"
    flat = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tuple(x.shape)} {x.dtype} ".encode() + flat).hexdigest()


def operator_cases() -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """The bare operator: every static pattern, shape and form of call."""
    from sa_hf import available_patterns, sparse_attention

    for name, options in STATIC.items():
        for fields in options:
            config = available_patterns()[name](**fields)
            for shape in SHAPES:
                for causal in (False, True):
                    for form, dtype, extra in forms(shape):
                        batch, heads, kv_heads, n_q, n_k, dim = shape
                        made = torch.Generator().manual_seed(3)
                        sizes = ((batch, heads, n_q, dim), *2 * [(batch, kv_heads, n_k, dim)], (batch, heads, n_q, dim))
                        *inputs, grad = (torch.randn(size, generator=made).to(dtype) for size in sizes)
                        inputs = [x.requires_grad_() for x in inputs]
                        torch.manual_seed(5)  # the seed of the dropout
                        out = sparse_attention(*inputs, config, causal=causal, **extra)
                        grads = torch.autograd.grad(out, inputs, grad)
                        label = f"{name} {fields} {shape} {'causal' if causal else 'full'} {form}"
                        yield label, dict(zip(("out", "query", "key", "value"), (out, *grads), strict=True))


def forms(shape: tuple[int, ...]) -> list[tuple[str, torch.dtype, dict[str, Any]]]:
    """(name, dtype, arguments) of the calls of a shape."""
    batch, keys = shape[0], shape[4]
    at = torch.arange(keys).expand(batch, -1)
    right = (at < torch.tensor([keys - 30, keys])[:batch, None]).long()
    left = (at >= torch.tensor([41, 0])[:batch, None]).long()
    holes = ((at % 7 != 3) & (right > 0)).long()
    packed = (at >= 50).long() + (at >= 131).long()
    f32 = torch.float32
    return [
        ("plain", f32, {}), ("bf16", torch.bfloat16, {}), ("fp16", torch.float16, {}), ("fp64", torch.float64, {}),
        ("right padding", f32, {"attention_mask": right}), ("left padding", f32, {"attention_mask": left}),
        ("holes", f32, {"attention_mask": holes}), ("packed", f32, {"sequence_ids": packed}),
        ("dropout", f32, {"dropout": 0.2}), ("scaled", f32, {"scale": 0.5}),
    ]  # fmt: skip


def model_cases() -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """Patched tiny models: every pattern, the learned ones too, in training, evaluation and decoding."""
    import transformers as tf

    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
        "max_position_embeddings": 256,
    }  # fmt: skip
    llama = tf.LlamaConfig(**sizes, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    t5 = tf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
    )  # fmt: skip
    gemma = tf.Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, pad_token_id=0, sliding_window=32, attn_logit_softcapping=2.0,
        query_pre_attn_scalar=16, attn_implementation="eager",
    )  # fmt: skip
    makers = {
        "llama": lambda: tf.LlamaForCausalLM(llama),
        "gemma2": lambda: tf.Gemma2ForCausalLM(gemma),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**sizes)),
        "t5": lambda: tf.T5ForConditionalGeneration(t5),
    }
    for label, fields in MODELS.items():
        for family, make in makers.items():
            made = patched(make, label, fields)
            if made is not None:
                yield from ((f"{family} {label} {what}", tensors) for what, tensors in runs(made))


def patched(make: Any, label: str, fields: dict[str, Any]) -> Any:
    """A model of a pattern; None where the pattern refuses it."""
    from sa_hf import SparseAttentionError, freeze_masks, patch_model

    torch.manual_seed(0)
    model = make()
    name = label.split()[0]
    try:
        torch.manual_seed(1)
        if name == "mixture":
            return patch_model(model, fields)
        model = patch_model(model, name, **fields)
        return freeze_masks(model) if "frozen" in label else model
    except SparseAttentionError:
        return None


def runs(model: Any) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    ids = torch.randint(3, 99, (2, 150), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(150) < torch.tensor([150, 117])[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        torch.manual_seed(7)
        out = model(**inputs)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        yield "train" if training else "eval", {"logits": out.logits, "loss": out.loss, **grads}
    if not model.can_generate():
        return
    try:
        made = model.generate(
            ids[:, :90], attention_mask=torch.ones(2, 90, dtype=torch.long), max_new_tokens=12, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    except ValueError as error:  # what a build refuses is part of what it does
        yield f"decode refused: {error}", {}
        return
    yield "decode", {"tokens": made.sequences, "scores": torch.stack(made.scores)}


def record(path: Path) -> None:
    """Write the digests of all cases, ``{case: {tensor: sha256}}``."""
    torch.use_deterministic_algorithms(False)
    found = {}
    for cases in (operator_cases, model_cases):
        for label, tensors in cases():
            found[label] = {name: digest(x) for name, x in tensors.items()}
    path.write_text(json.dumps(found, indent=1))
    print(f"{len(found)} cases -> {path}")


def differences(mine: dict[str, Any], theirs: dict[str, Any], torch_too: bool) -> list[str]:
    """Cases whose bits differ, or that one side lacks."""
    lines = []
    for label in sorted(mine.keys() | theirs.keys()):
        if "fp64" in label and not torch_too:
            continue
        a, b = mine.get(label), theirs.get(label)
        if a is None or b is None:
            lines.append(f"{label}: only on one side")
        elif a != b:
            lines.append(f"{label}: {', '.join(x for x in a.keys() | b.keys() if a.get(x) != b.get(x))}")
    return lines


def run_in(tree: Path, out: Path, torch_only: bool) -> dict[str, Any]:
    """Record in a process of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if torch_only:
        environment["SA_HF_CPU_KERNELS"] = "0"
    subprocess.run([sys.executable, str(Path(__file__).resolve()), "--out", str(out)], check=True, env=environment)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of a git revision, while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True, cwd=ROOT)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True, cwd=ROOT)


def against(revision: str, torch_too: bool) -> list[str]:
    """Differences between this checkout and a revision."""
    lines = []
    with worktree(revision) as tree, tempfile.TemporaryDirectory() as folder:
        for torch_only in (False, True) if torch_too else (False,):
            mine, theirs = (run_in(x, Path(folder) / f"{x.name}.json", torch_only) for x in (ROOT, tree))
            lines += differences(mine, theirs, torch_too)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the digests of this checkout")
    parser.add_argument("--compare", type=Path, nargs=2, help="two such files")
    parser.add_argument("--against", help="a git revision")
    parser.add_argument("--torch", action="store_true", help="also what torch's operators compute")
    args = parser.parse_args()
    if args.out:
        record(args.out)
        return 0
    if args.compare:
        lines = differences(*(json.loads(path.read_text()) for path in args.compare), args.torch)
    elif args.against:
        lines = against(args.against, args.torch)
    else:
        parser.error("give --against, --out or --compare")
    print("\n".join(lines) or "the same bits in every case")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
