"""torch.compile sees one opaque operator: no graph break, no change of result, one graph over lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_hf import patch_model, sparse_attention
from sa_hf.config import pattern_class

CONFIGS = [
    ("sliding_window", {"window": 30, "num_sink_tokens": 2}),
    ("bigbird", {"block_size": 16}),
    ("longnet", {"segment_length": (16, 64), "dilated_ratio": (1, 4)}),
    ("logsparse", {}),
    ("sparse_transformer", {"kind": "fixed", "stride": 16, "summary": 4}),
    ("star", {"ring": False}),
]


def gradients(run: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize(("name", "fields"), CONFIGS, ids=[n for n, _ in CONFIGS])
def test_operator_compiles_whole(name: str, fields: dict[str, Any]) -> None:
    config = pattern_class(name)(**fields)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, config, causal=True) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for length in (48, 70):
        generator = torch.Generator().manual_seed(length)
        qkv = [torch.randn(2, 4, length, 16, generator=generator) for _ in range(3)]
        for ours, expected in zip(gradients(compiled, *qkv), gradients(run, *qkv), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_operator_passes_opcheck() -> None:
    from sa_hf.ops.parts import UNBOUNDED
    from sa_hf.patterns.custom_op import layer_key

    config = pattern_class("sliding_window")(window=5)
    key = layer_key(config, (0, 1), 2, 0, True, UNBOUNDED, "native")
    q, k, v = (torch.randn(1, 2, 12, 16, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, requires_grad=True)
    of_query, of_key = (torch.randn(1, 2, 12, 3, requires_grad=True) for _ in range(2))
    buckets = torch.tensor([0, 1, 2])
    for terms in ((None,) * 4, (of_query, of_key, buckets, buckets)):
        torch.library.opcheck(
            torch.ops.sa_hf.static_attention.default,
            (q, k, v, None, sinks, *terms, None, None, None, None, None, key, [], 0, 0.25, 0.0, 0.0),
        )


@pytest.mark.parametrize("padded", [False, True])
def test_patched_decoder_compiles_whole(padded: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=128,
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config).eval(), "sliding_window", window=9)
    ids = torch.randint(64, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    call = {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if padded else {})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, ours = model(**call).logits, compiled(**call).logits
    torch.testing.assert_close(ours, expected)
    for theirs, mine in zip(
        *([*torch.autograd.grad(x.square().sum(), list(model.parameters()))] for x in (expected, ours)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


LEARNED = [
    ("routing", {"num_clusters": 4}),
    ("block_topk", {"block_size": 4, "num_window_blocks": 3, "top_k": 2}),
    ("sparsebert", {"mask_length": 64}),
    ("expire_span", {"max_span": 16, "ramp": 4}),
    ("logsparse", {"conv_kernel_size": 3}),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize(("name", "fields"), LEARNED, ids=[n for n, _ in LEARNED])
def test_learned_patterns_compile_whole(name: str, fields: dict[str, Any], family: str, training: bool) -> None:
    import transformers as tf

    torch._dynamo.reset()  # the models of earlier cases count as recompilations
    if name == "expire_span" and family == "encoder":
        pytest.skip("expire_span is causal")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
        "max_position_embeddings": 128,
    }  # fmt: skip
    if family == "decoder":
        model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2))
    else:
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = tf.BertForMaskedLM(tf.BertConfig(**sizes, **no_dropout))
    model = patch_model(model.train(training), name, **fields)
    call = {"input_ids": torch.randint(64, (2, 40))} | ({"use_cache": False} if family == "decoder" else {})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Gumbel noise and such are drawn by the number of the training forward: the first of each of two equal models.
    twin = copy.deepcopy(model)
    if training:  # inside one graph the losses that a pattern learns by join the model's own, so it needs labels
        call["labels"] = call["input_ids"]
    expected, ours = twin(**call), compiled(**call)
    torch.testing.assert_close(ours.logits, expected.logits)
    if training:
        torch.testing.assert_close(ours.loss, expected.loss)
    grads = [
        torch.autograd.grad(
            x.logits.square().sum() + (x.loss if training else 0), list(m.parameters()), allow_unused=True
        )
        for x, m in ((expected, twin), (ours, model))
    ]
    for theirs, mine in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for _ in range(2):  # the counts of steps are new, and gradients are there
        compiled(**call).logits.sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(**call).logits, [twin(**call).logits for _ in range(3)][-1])


def test_compiled_packing_follows_the_position_ids() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=128,
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config).eval(), "logsparse")
    ids = torch.randint(64, (1, 30))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for cut in (11, 17):  # the same graph, other sequences
            positions = torch.cat([torch.arange(cut), torch.arange(30 - cut)])[None]
            packed = compiled(input_ids=ids, position_ids=positions, use_cache=False).logits
            alone = model(input_ids=ids[:, cut:], use_cache=False).logits
            torch.testing.assert_close(packed[:, cut:], alone)
