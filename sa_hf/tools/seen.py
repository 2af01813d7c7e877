"""What the layers of a patched model are given on a text, and which pairs they read of it: seen, not derived."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.config import SparseAttention
from sa_hf.layer import AttentionInputs


@torch.no_grad()
def inputs_seen(root: Any, modules: Iterable[SparseAttention], input_ids: Tensor) -> dict[int, AttentionInputs]:
    """What pattern modules are given in one forward in evaluation on a text ``[1, n]``, by their identity."""
    seen: dict[int, AttentionInputs] = {}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen[id(module)] = given[0]

    both = {"decoder_input_ids": input_ids} if root.config.is_encoder_decoder else {}
    training = root.training
    root.eval()
    try:
        with ExitStack() as stack:
            for module in {id(module): module for module in modules}.values():
                stack.callback(module.register_forward_pre_hook(note).remove)
            root(input_ids=input_ids, **both)
    finally:
        root.train(training)
    return seen


@torch.no_grad()
def attended(child: SparseAttention, inputs: AttentionInputs, rows: Tensor | None = None) -> Tensor:
    """Which pairs a layer reads on some inputs, and how open the gate of each is: fp32 ``[H, n, n]`` in [0, 1].

    Of the first sequence, and of ``rows``, int64 ``[r]``, alone where given (``[H, r, n]``, and nothing of n x n); the
    weight of a pair over the largest of its row, all scores next to 0 by a scale that is a power of two smaller (what
    is chosen by content does not hang on that; an indexer divides by it). The module runs again with the values of one
    key after the other, so that its output is the weight of each pair.
    """
    keys, width = inputs.key.shape[2], inputs.value.shape[3]
    plain = replace(
        inputs, scale=inputs.scale * 2.0**-40, softcap=None, distance_bias=None, query_term=None, key_term=None,
        dropout=0.0, remember=None, beside=None,
    )  # fmt: skip
    pieces = []
    for begin in range(0, keys, width):
        at = torch.arange(begin, min(begin + width, keys), device=inputs.value.device)
        value = torch.zeros_like(inputs.value)
        value[:, :, at, at - begin] = 1
        weight = child(replace(plain, value=value))[0, ..., : len(at)].float()
        pieces.append(weight if rows is None else weight[:, rows])
    weights = torch.cat(pieces, -1)
    return weights / weights.amax(-1, keepdim=True).clamp(min=1e-30)
