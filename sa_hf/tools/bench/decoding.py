"""Decoding on the CPU: a token's time in a small Llama by pattern and cache, beside dense attention in one process.

Attention time is a step's time less that of the same model with a window of 1 (the zero): the rest of the model, and
what a patched layer costs whatever it reads, go out of the comparison.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sa_hf.config import pattern_class
from sa_hf.patterns.sparsebert import SparseBertAttention
from sa_hf.tools.bench.cpu import HEAD_DIM, HEADS, CpuCase, cpu_cases, keep_every_32nd_distance

LAYERS, KEY_HEADS, VOCABULARY = 6, 4, 1024
# Steps of a contender one after the other: its own tensors stay in the caches, as when it decodes alone.
BLOCK = 16
STEPS, TOY_STEPS = 64, 4
CACHES = ("static", "sparse", "dynamic")
SHAPE = f"a Llama of {LAYERS} layers, {HEADS} query and {KEY_HEADS} key heads of {HEAD_DIM}, fp32, batch 1"


def decode_cases(length: int, toy: bool = False) -> dict[str, CpuCase]:
    """The causal patterns of the CPU benchmark, the star, and a SparseBERT mask that is not frozen."""
    cases = {label: case for label, case in cpu_cases(length, toy).items() if case.causal}
    frozen = cases["sparsebert frozen"]
    star = CpuCase("star causal", pattern_class("star")(), True, lambda n: 3 * n)
    return {**cases, "star causal": star, "sparsebert": replace(frozen, label="sparsebert")}


def decode_times(label: str, length: int, *, toy: bool) -> dict[str, float]:
    """Median milliseconds of a step after ``length`` tokens: ``dense static``, ``dense dynamic``, ``zero static``, and
    the pattern's with each kind of cache; how many steps."""
    import sa_hf

    steps = TOY_STEPS if toy else STEPS
    dense = _llama(length + steps)
    zero, ours = (_alike(dense) for _ in range(2))
    sa_hf.patch_model(zero, "sliding_window", window=1)
    case = decode_cases(length, toy)[label]
    sa_hf.patch_model(ours, case.config)
    for module in ours.modules():
        if isinstance(module, SparseBertAttention):
            keep_every_32nd_distance(module)
    if label == "sparsebert frozen":
        sa_hf.freeze_masks(ours)
    ids = torch.randint(VOCABULARY, (1, length + steps), generator=torch.Generator().manual_seed(0))
    contenders = {
        # What lies in a cache does not matter to dense attention: the model without any fills it at once.
        **{f"dense {kind}": _Contender.of(dense, kind, ids, length, filled_by=zero) for kind in ("static", "dynamic")},
        "zero static": _Contender.of(zero, "static", ids, length),
        **{kind: _Contender.of(ours, kind, ids, length) for kind in CACHES},
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for begin in range(length, length + steps, BLOCK):
        for name, contender in contenders.items():
            for at in range(begin, min(begin + BLOCK, length + steps)):
                times[name].append(contender.step(at))
    return {"steps": steps, **{name: statistics.median(found) * 1e3 for name, found in times.items()}}


@dataclass(frozen=True, eq=False)
class _Contender:
    """A model in the middle of decoding."""

    model: Any
    cache: Any
    ids: torch.Tensor

    @classmethod
    def of(cls, model: Any, kind: str, ids: torch.Tensor, length: int, filled_by: Any = None) -> _Contender:
        cache = _CACHES[kind](model, ids.shape[1])
        cls(filled_by or model, cache, ids).run(0, length)
        return cls(model, cache, ids)

    def run(self, begin: int, end: int) -> None:
        with torch.no_grad():
            self.model(self.ids[:, begin:end], past_key_values=self.cache, logits_to_keep=1)

    def step(self, at: int) -> float:
        """Seconds of the step that takes token ``at``."""
        begin = time.perf_counter()
        self.run(at, at + 1)
        return time.perf_counter() - begin


def _static(model: Any, capacity: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=capacity)


def _dynamic(model: Any, capacity: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _sparse(model: Any, capacity: int) -> Any:
    import sa_hf

    return sa_hf.sparse_cache(model)


_CACHES: dict[str, Callable[[Any, int], Any]] = {"static": _static, "sparse": _sparse, "dynamic": _dynamic}


def _llama(positions: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    config = LlamaConfig(
        hidden_size=width, intermediate_size=1408, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, head_dim=HEAD_DIM, vocab_size=VOCABULARY, max_position_embeddings=positions,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _alike(model: Any) -> Any:
    """A model of the same class with the same weights, not copied."""
    with torch.device("meta"):
        other = type(model)(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    other.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its frequencies are in no state dict
    return other
