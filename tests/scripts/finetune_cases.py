"""The systems at toy size: encoders on the real MiniLM, causal ones on a small decoder."""

from __future__ import annotations

from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"

ENCODER = ["--model", "minilm", "--task", "masked-lm", "--max_length", "128"]
DECODER = ["--model", "tiny-llama", "--task", "causal-lm", "--max_length", "64"]

CASES: dict[str, list[str]] = {
    "longnet": [*DECODER, "--set", "segment_length=[16, 64]", "--set", "dilated_ratio=[1, 2]"],
    "logsparse": [*DECODER, "--set", "local_window=4", "--set", "conv_kernel_size=3"],
    "sparse_transformer": [*DECODER, "--set", "stride=16", "--set", "summary=4"],
    "sparsebert": [*ENCODER, "--set", "mask_length=128"],
    "expire_span": [*DECODER, "--set", "max_span=32", "--set", "ramp=8"],
    "routing": [*ENCODER, "--set", "num_clusters=4"],
    "bigbird": [*ENCODER, "--set", "block_size=16", "--set", "num_random_blocks=1"],
    "block_topk": [*ENCODER, "--set", "block_size=16", "--set", "top_k=2", "--set", "num_window_blocks=1"],
    "star": [*ENCODER, "--set", "relay=virtual"],
}

FEW_STEPS = [
    *("--train_rows", "4", "--eval_rows", "2", "--max_steps", "2", "--batch_size", "2", "--eval_batch_size", "2"),
    *("--logging_steps", "1", "--cpu"),
]
