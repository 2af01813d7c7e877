"""``block_topk`` with ``indexer``: starts as the unlearned choice, learns dense attention's mass on blocks, decodes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from learned_cases import Memory, attention_inputs, draw, layer_spec, rms_ratio

from sa_hf import BlockTopKAttentionConfig, NotStaticError, SparseAttentionError, sparse_attention
from sa_hf.layer import AttentionInputs
from sa_hf.ops.parts import Band, ScoreOptions
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.block_index import block_mass, sampled_rows
from sa_hf.patterns.block_topk import IndexedBlockTopKAttention

SMALL: dict[str, Any] = {"block_size": 4, "top_k": 2, "num_window_blocks": 1, "num_sink_blocks": 1}
CASES: list[dict[str, Any]] = [
    SMALL,
    {**SMALL, "selection": "query"},
    {**SMALL, "selection": "query", "pooling": "max", "shared_by_group": False},
    {**SMALL, "shared_by_group": False, "num_sink_blocks": 0},
    {**SMALL, "block_size": 16, "top_k": 1},
]
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
LOSS = "block_topk_indexer"


def ids(fields: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in fields.items() if SMALL.get(k) != v) or "small"


def indexed(fields: dict[str, Any], causal: bool, moved: bool = False) -> IndexedBlockTopKAttention:
    """A layer of 4 query heads on 2 key heads; ``moved`` as if it had learned."""
    module = BlockTopKAttentionConfig(**fields, indexer=True).build(layer_spec(4, 2, causal=causal))
    assert isinstance(module, IndexedBlockTopKAttention)
    if moved:
        with torch.no_grad():
            module.index_query.copy_(4 * draw(*module.index_query.shape, seed=7))
    return module


def inputs_of(length: int, causal: bool, **more: Any) -> AttentionInputs:
    made = attention_inputs(2, 4, 2, length, 16, causal, **more)
    return replace(made, **{n: getattr(made, n).detach().double() for n in ("query", "key", "value", "hidden_states")})


@CAUSAL
@pytest.mark.parametrize("fields", CASES, ids=ids)
def test_it_starts_as_the_unlearned_choice(fields: dict[str, Any], causal: bool) -> None:
    inputs = inputs_of(70, causal)
    plain = BlockTopKAttentionConfig(**fields).build(layer_spec(4, 2, causal=causal))(inputs)
    assert torch.equal(indexed(fields, causal)(inputs), plain)
    assert rms_ratio(indexed(fields, causal, moved=True)(inputs), plain) > 1e-3


def plain_divergence(module: IndexedBlockTopKAttention, inputs: AttentionInputs) -> float:
    """The loss in loops over its definition: rows, heads that choose, eligible blocks."""
    config, b, n = module.config, module.config.block_size, inputs.query.shape[2]
    w, blocks, total, count = config.num_window_blocks, -(-n // b), 0.0, 0
    x = inputs.hidden_states / inputs.hidden_states.square().mean(-1, keepdim=True).add(1e-6).sqrt()  # type: ignore[union-attr]
    hidden = x.shape[-1]
    per = 1 if config.selection == "query" else b
    heads_of = [[0, 1], [2, 3]] if config.shared_by_group else [[0], [1], [2], [3]]
    pool = (lambda t: t.amax(0)) if config.pooling == "max" else (lambda t: t.mean(0))
    for row in range(inputs.query.shape[0]):
        for chooser, heads in enumerate(heads_of):
            kv = heads[0] // 2
            key = inputs.key[row, kv]
            known = x[row] @ module.index_key[kv].double().t() / hidden**0.5
            asked = x[row] @ module.index_query[chooser].double().t() / hidden**0.75
            for first in range(0, n, per):
                own = first // b
                inside = [j for j in range(blocks) if j >= config.num_sink_blocks]
                inside = [j for j in inside if (j <= own - w if inputs.causal else abs(j - own) > w // 2)]
                if len(inside) < 2:
                    continue
                at = range(first, min(first + per, n))
                source = at
                if per > 1 and inputs.causal:
                    source = range(first - b, first)
                scores, mass = [], []
                for j in inside:
                    span = slice(j * b, min((j + 1) * b, n))
                    products = [inputs.query[row, h, list(source)].mean(0) @ pool(key[span]) for h in heads]
                    learned = asked[list(source)].mean(0) @ pool(known[span])
                    scores.append(inputs.scale * sum(products) / len(heads) + learned)
                    part = 0.0
                    for h in heads:
                        for i in at:
                            dots = inputs.query[row, h, i] @ key.t() * inputs.scale
                            if inputs.causal:
                                dots[i + 1 :] = -math.inf
                            part += float(torch.softmax(dots.detach(), -1)[span].sum())
                    mass.append(part)
                target = torch.tensor(mass, dtype=torch.float64) / sum(mass)
                log_chosen = torch.log_softmax(torch.stack([s.detach() for s in scores]), -1)
                total += float((target * (target.log() - log_chosen)).sum())
                count += 1
    return total / count


@CAUSAL
@pytest.mark.parametrize("fields", CASES[:4], ids=ids)
def test_the_loss_is_the_divergence_from_dense_mass(fields: dict[str, Any], causal: bool) -> None:
    inputs = inputs_of(30, causal)
    leaves = [getattr(inputs, n).requires_grad_() for n in ("query", "key", "hidden_states")]
    module = indexed(fields, causal, moved=True).train()
    module(inputs)
    loss = module.aux_losses()[LOSS]
    assert float(loss.detach()) == pytest.approx(plain_divergence(module, inputs), rel=1e-5)
    loss.backward()
    assert all(leaf.grad is None for leaf in leaves)  # nothing but the projections learns from it
    assert all(float(p.grad.abs().sum()) > 0 for p in (module.index_query, module.index_key))
    assert float(module.unscaled_losses()[LOSS]) == float(loss.detach())
    module.eval()(inputs)
    assert LOSS not in module.unscaled_losses()


def test_mass_under_bias_cap_and_window() -> None:
    query, key, table = draw(1, 2, 3, 8), draw(1, 1, 20, 8, seed=1), draw(2, 39, seed=2)
    options = ScoreOptions(0.5, softcap=3.0, distance_bias=table)
    at = torch.tensor([4, 11, 19])
    mass = block_mass(query, at, key, 6, Band(9, 0), options)
    for head in range(2):
        for row, i in enumerate(at.tolist()):
            dots = 3.0 * torch.tanh(query[0, head, row] @ key[0, 0].t() * 0.5 / 3.0)
            dots = dots + torch.stack([table[head, j - i + 19] for j in range(20)])
            kept = [j for j in range(20) if 0 <= i - j <= 9]
            weights = torch.softmax(dots[kept], -1)
            expected = [
                sum(float(p) for p, j in zip(weights, kept, strict=True) if j // 6 == block) for block in range(4)
            ]
            assert torch.allclose(mass[0, head, row], torch.tensor(expected), atol=1e-6)


def test_every_row_has_its_turn() -> None:
    seen = [sampled_rows(10, 4, torch.tensor(turn)) for turn in range(3)]
    assert [x.tolist() for x in seen] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 10]]  # 10: none
    assert sampled_rows(10, 100, torch.tensor(7)).tolist() == list(range(10))


def mass_read(module: IndexedBlockTopKAttention, inputs: AttentionInputs) -> float:
    """The part of dense attention's mass, among the blocks that may be chosen, that the choice reads."""
    module.eval()(inputs)
    ((chosen, own),) = module._seen
    config, b, n = module.config, module.config.block_size, inputs.query.shape[2]
    at = torch.arange(n)
    mass = block_mass(inputs.query, at, inputs.key, b, Band(None, 0), ScoreOptions(inputs.scale))
    mass = mass.unflatten(2, (-1, b)).sum(3).unflatten(1, (chosen.shape[1], -1)).sum(2)
    allowed = config.sets(True).eligible(own[:, None] * b, own[:, None] * b, torch.arange(n // b), Band())
    mass = torch.where(allowed, mass, 0.0)
    got = torch.where(chosen >= 0, mass.gather(-1, chosen.clamp(min=0)), 0.0)
    return float(got.sum() / mass.sum())


def with_needles(seed: int) -> AttentionInputs:
    """Keys whose block means say nothing of the few tokens that are read most; the layer's input tells which these are
    (its dimension 1; dimension 0 is constant)."""
    n, block = 256, 8
    hidden = draw(2, n, 64, seed=seed)
    needle = (draw(2, n, seed=seed + 1) > 2.3).float()
    hidden[..., 0], hidden[..., 1] = 1.0, 6 * needle
    query, key = 0.6 * draw(2, 4, n, 16, seed=seed + 2), 0.3 * draw(2, 2, n, 16, seed=seed + 3)
    query[..., 0], key[..., 0] = 4.0, 6 * needle[:, None]
    noise = 1.5 * draw(2, 2, n // block, 16, seed=seed + 4)
    key += noise.repeat_interleave(block, 2)
    return AttentionInputs(query, key, key, Sequences.full(2, n, n), True, 0.25, hidden_states=hidden)


def test_it_learns_what_a_mean_hides() -> None:
    module = indexed({**SMALL, "block_size": 8}, causal=True)
    held_out = with_needles(1000)
    before = mass_read(module, held_out), loss_on(module, held_out)
    optimizer = torch.optim.Adam([module.index_query, module.index_key], lr=0.05)
    for step in range(120):
        module.train().advance_step()
        module(with_needles(10 * step))
        optimizer.zero_grad()
        module.aux_losses()[LOSS].backward()
        optimizer.step()
    after = mass_read(module, held_out), loss_on(module, held_out)
    assert after[0] > before[0] + 0.03, (before, after)
    assert after[1] < 0.5 * before[1], (before, after)


def loss_on(module: IndexedBlockTopKAttention, inputs: AttentionInputs) -> float:
    module.train()(inputs)
    return float(module.aux_losses()[LOSS].detach())


@pytest.mark.parametrize("fields", CASES, ids=ids)
@pytest.mark.parametrize("cuts", [(20, 21, 22, 40, 41, 75), (1, 75), (74, 75)], ids=str)
def test_steps_choose_as_the_whole_forward(fields: dict[str, Any], cuts: tuple[int, ...]) -> None:
    inputs = inputs_of(75, True)
    module = indexed(fields, True, moved=True).eval()
    whole, memory, start, out = module(inputs), Memory(), 0, []
    for end in cuts:
        part = {n: getattr(inputs, n)[:, :, :end] for n in ("key", "value")}
        step = replace(
            inputs, query=inputs.query[:, :, start:end], hidden_states=inputs.hidden_states[:, start:end], **part,
            sequences=Sequences.full(2, end - start, end), remember=memory, beside=memory.beside,
        )  # fmt: skip
        out.append(module(step))
        start = end
    assert rms_ratio(torch.cat(out, 2), whole) < 1e-13


@CAUSAL
@pytest.mark.parametrize("fields", CASES[:2], ids=ids)
def test_padding_and_packing_change_nothing(fields: dict[str, Any], causal: bool) -> None:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :13], mask[1, 40:] = 0, 0
    packed = torch.zeros(2, 60, dtype=torch.long)
    packed[:, 30:] = 1
    inputs = inputs_of(60, causal, sequences=Sequences.from_mask(2, 60, 60, mask, packed))
    module = indexed(fields, causal, moved=True)
    out, total, rows = module.train()(inputs), 0.0, 0.0
    together = float(module.aux_losses()[LOSS].detach())
    for row in range(2):
        for number in range(2):
            at = torch.nonzero((mask[row] == 1) & (packed[row] == number)).flatten()
            one = {n: getattr(inputs, n)[row : row + 1, :, at] for n in ("query", "key", "value")}
            hidden = inputs.hidden_states[row : row + 1, at]  # type: ignore[index]
            alone = replace(inputs, **one, hidden_states=hidden, sequences=Sequences.full(1, len(at), len(at)))
            assert rms_ratio(out[row : row + 1, :, at], module(alone)) < 1e-12
            b, w = 4, 1
            length, per = len(at), 1 if fields.get("selection") == "query" else b
            firsts = range(0, length, per)
            own = [first // b for first in firsts]
            eligible = [
                sum(1 for j in range(1, -(-length // b)) if (j <= o - w if causal else abs(j - o) > w // 2))
                for o in own
            ]
            count = 2 * sum(e > 1 for e in eligible)
            total, rows = total + count * float(module.aux_losses()[LOSS].detach()), rows + count
    assert together == pytest.approx(total / rows, rel=1e-5)


def test_what_cannot_be_is_refused() -> None:
    config = BlockTopKAttentionConfig(**SMALL, indexer=True)
    with pytest.raises(NotStaticError, match="without its indexer"):
        sparse_attention(*(draw(1, 1, 8, 16) for _ in range(3)), config, causal=True)
    with pytest.raises(SparseAttentionError, match="hidden_states is None"):
        indexed(SMALL, True)(replace(inputs_of(20, True), hidden_states=None))
