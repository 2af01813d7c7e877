"""The learned patterns under torch.compile: one graph, equal outputs and gradients, data that changes between calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from learned_cases import attention_inputs, draw, layer_spec
from torch import Tensor

from sa_hf.config import SparseAttentionConfig
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig
from sa_hf.patterns.expire_span import ExpireSpanAttentionConfig
from sa_hf.patterns.routing import RoutingAttentionConfig
from sa_hf.patterns.sparsebert import SparseBertAttentionConfig

CASES: list[tuple[SparseAttentionConfig, bool]] = [
    (ExpireSpanAttentionConfig(max_span=40, ramp=6, initial_span=10.0), True),
    (RoutingAttentionConfig(num_clusters=4, window=5), True),
    (RoutingAttentionConfig(num_clusters=4, commitment_coef=0.1, local_window=3), False),
    (BlockTopKAttentionConfig(block_size=4, top_k=2), True),
    (BlockTopKAttentionConfig(block_size=16, top_k=1, num_window_blocks=1), False),
    (BlockTopKAttentionConfig(block_size=4, top_k=2, num_window_blocks=1, selection="query"), False),
    (BlockTopKAttentionConfig(block_size=4, top_k=2, num_window_blocks=1, indexer=True), True),
    (SparseBertAttentionConfig(mask_length=64), True),
    (SparseBertAttentionConfig(mask_length=64, frozen=True), False),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("config", "causal"), CASES, ids=lambda x: getattr(x, "name", None))
def test_one_graph_gives_equal_outputs_and_gradients(
    config: SparseAttentionConfig, causal: bool, training: bool
) -> None:
    torch._dynamo.reset()
    module = config.build(layer_spec(causal=causal)).train(training)
    if "kept" in module.state_dict():
        module.kept.copy_(draw(*module.kept.shape, seed=3) > 1)

    def run(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        call = replace(inputs, query=query, key=key, value=value, hidden_states=hidden)
        return module(call)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for seed in (0, 20):  # other spans and clusters, the same graph
        inputs = attention_inputs(length=40, causal=causal, seed=seed)
        leaves = (inputs.query, inputs.key, inputs.value, inputs.hidden_states)
        expected, out = run(*leaves), compiled(*leaves)
        assert torch.equal(out, expected)
        for ours, theirs in zip(
            torch.autograd.grad(out.square().sum(), leaves[:3]),
            torch.autograd.grad(expected.square().sum(), leaves[:3]),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
