"""Training whole models on the CPU: tokens a second and peak memory of a step, patched and dense, in one process.

A step is a forward, a backward and AdamW's update of a model with random weights in the shape of a known one, with
fewer layers. BERT trains with its dropout of 0.1: dense attention has no fused form of that on the CPU and keeps
matrices n x n; where the machine has no memory for them the row says so, and dense attention without dropout is shown.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from sa_hf.tools.bench import cpu
from sa_hf.tools.bench.names import row_title

LAYERS, HEADS, HIDDEN, VOCABULARY = 4, 12, 768, 8192
# Kept for the backward of a layer of dense attention with dropout, in matrices of a head: scores, probabilities, mask
# and what is dropped; and what stands beside them at the peak.
MATRICES_KEPT, MATRICES_BESIDE = 4, 3
MODELS = {
    "bert": f"BERT, {LAYERS} layers of {HIDDEN}, {HEADS} heads, dropout 0.1",
    "llama": f"Llama, {LAYERS} layers of {HIDDEN}, {HEADS} query and 4 key heads",
}
PATTERNS = {"bert": ("window", "bigbird"), "llama": ("window causal", "bigbird causal", "longnet")}
DENSE, NO_DROPOUT = "dense", "dense, no dropout"
WARM_ROUNDS, ROUNDS = 1, 3


def contenders(model: str, patterns: list[str]) -> list[str]:
    """The rows of a model: dense attention, for BERT also without dropout, and the patterns asked for."""
    dense = [DENSE, NO_DROPOUT] if model == "bert" else [DENSE]
    return [*dense, *(label for label in PATTERNS[model] if label in patterns)]


def build(model: str, label: str, length: int, dtype: torch.dtype, *, toy: bool) -> Any:
    """A model in training, patched by the label's pattern; the same weights for every label."""
    import sa_hf

    torch.manual_seed(0)
    net = _bert(length, label, toy) if model == "bert" else _llama(length, toy)
    if label not in (DENSE, NO_DROPOUT):
        sa_hf.patch_model(net, cpu.cpu_cases(length, toy)[label].config)
    return net.to(dtype).train()


def step_times(model: str, labels: list[str], length: int, *, toy: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Median seconds of a step by contender, one step of each in turn; what had no memory, with the reason."""
    failed = {label: reason for label in labels if (reason := no_memory(model, label, length, dtype, toy=toy))}
    runs = {label: _Training(model, label, length, dtype, toy=toy) for label in labels if label not in failed}
    times: dict[str, list[float]] = {label: [] for label in runs}
    for number in range(1 if toy else WARM_ROUNDS + ROUNDS):
        for label, run in runs.items():
            seconds = run.step()
            if toy or number >= WARM_ROUNDS:
                times[label].append(seconds)
    return {"seconds": {label: statistics.median(found) for label, found in times.items()}, "failed": failed}


def step_memory(model: str, label: str, length: int, *, toy: bool, dtype: torch.dtype) -> dict[str, Any]:
    """MB of resident memory at the peak of a step, model and optimiser included; nothing where it has no room."""
    if no_memory(model, label, length, dtype, toy=toy):
        return {}
    run = _Training(model, label, length, dtype, toy=toy)
    run.step()  # the optimiser's state
    cpu._reset_peak()
    run.step()
    return {"mb": cpu._peak() / 2**20}


def no_memory(model: str, label: str, length: int, dtype: torch.dtype, *, toy: bool) -> str | None:
    """Why dense attention with dropout cannot run here, or None."""
    if model != "bert" or label != DENSE or toy:
        return None
    matrix = HEADS * length * length * torch.finfo(dtype).bits // 8
    needed = (LAYERS * MATRICES_KEPT + MATRICES_BESIDE) * matrix
    if needed < cpu._available():
        return None
    return f"no memory: {needed / 2**30:.0f} GB of matrices n x n"


class _Training:
    """A model, its optimiser and its batch of one sequence."""

    def __init__(self, model: str, label: str, length: int, dtype: torch.dtype, *, toy: bool) -> None:
        self.net = build(model, label, length, dtype, toy=toy)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4)
        self.ids = torch.randint(VOCABULARY // 8, (1, length), generator=torch.Generator().manual_seed(1))

    def step(self) -> float:
        """Its seconds."""
        begin = time.perf_counter()
        self.net(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin


def _bert(length: int, label: str, toy: bool) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    dropout = 0.0 if label == NO_DROPOUT else 0.1
    config = BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=length, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, attn_implementation="sdpa", **_shape(toy),
    )  # fmt: skip
    return BertForMaskedLM(config)


def _llama(length: int, toy: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=length, num_key_value_heads=2 if toy else 4, use_cache=False,
        attn_implementation="sdpa", **_shape(toy),
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _shape(toy: bool) -> dict[str, int]:
    heads, layers = (2, 1) if toy else (HEADS, LAYERS)
    return {
        "hidden_size": 64 * heads, "intermediate_size": 64 * heads * (4 if toy else 3), "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip


def training_tables(rows: list[dict[str, Any]]) -> list[str]:
    """The section of the report."""
    if not rows:
        return []
    lines = [
        "", "## Training whole models", "",
        f"A step of one sequence: forward, backward, AdamW; random weights, a vocabulary of {VOCABULARY:,}. "
        f"Tokens a second, medians of {ROUNDS} steps called in turn in one process, and over those of dense attention "
        "(of BERT the one without dropout, where the other has no memory); peak memory, each in a process of its own.",
        "", "| length | model | attention | tokens/s | peak memory |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        seconds, memory = row["seconds"], row["memory"]
        dense = DENSE if DENSE in seconds else NO_DROPOUT
        for label in (*seconds, *row["failed"]):
            start = f"| {row['length']:,} | {MODELS[row['model']]} | {row_title(label)} |"
            if label in row["failed"]:
                lines.append(f"{start} {row['failed'][label]} | |")
                continue
            speed = f"{row['length'] / seconds[label]:,.0f} ({seconds[dense] / seconds[label]:.2f}x)"
            peak = memory[label] / memory[dense] if dense in memory else None
            lines.append(f"{start} {speed} | {memory[label]:,.0f} MB{'' if peak is None else f' ({peak:.2f}x)'} |")
    return lines
