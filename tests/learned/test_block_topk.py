"""``block_topk`` against plain loops over its definition: sets, outputs, gradients; no leak; padding and packing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import block_topk_cases as cases
import pytest
import torch
from learned_cases import Memory, attention_inputs, draw, layer_spec, rms_ratio
from torch import Tensor

from sa_hf import BlockTopKAttentionConfig, NotStaticError, SparseAttentionError, sparse_attention
from sa_hf.layer import AttentionInputs
from sa_hf.ops.parts import Band, ScoreOptions
from sa_hf.ops.planned import PlanData
from sa_hf.ops.reference import part_multiplicity
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.block_sets import BlockSets, choose_blocks, kept_pairs, plan_parts, pooled_keys

SMALL: dict[str, Any] = {"block_size": 4, "top_k": 2, "num_window_blocks": 1, "num_sink_blocks": 1}
CASES: list[dict[str, Any]] = [
    SMALL,
    {**SMALL, "selection": "query"},
    {**SMALL, "selection": "query", "pooling": "max", "shared_by_group": False},
    {**SMALL, "pooling": "max", "num_window_blocks": 3, "top_k": 1},
    {**SMALL, "shared_by_group": False, "num_sink_blocks": 0},
    {**SMALL, "block_size": 16, "top_k": 1},  # lists of tiles
    {**SMALL, "block_size": 32, "shared_by_group": False},
    {**SMALL, "block_size": 48, "num_sink_blocks": 0, "top_k": 1, "selection": "query"},
    {**SMALL, "block_size": 7, "num_sink_blocks": 2, "drop_diagonal": True},
    {**SMALL, "block_size": 16, "drop_diagonal": True, "selection": "query"},
    {**SMALL, "block_size": 1, "num_sink_blocks": 0, "drop_diagonal": True, "top_k": 1},
    {**SMALL, "block_size": 64},
    {"block_size": 1000, "num_window_blocks": 3, "num_sink_blocks": 5, "top_k": 9},
]


def ids(fields: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in fields.items() if SMALL.get(k) != v) or "small"


def inputs_of(length: int, causal: bool, **more: Any) -> AttentionInputs:
    """Two sequences of 4 query heads on 2 key heads, fp64."""
    made = attention_inputs(2, 4, 2, length, 16, causal, **more)
    tensors = {n: getattr(made, n).detach().double().requires_grad_() for n in ("query", "key", "value")}
    return replace(made, **tensors)


def run(fields: dict[str, Any], inputs: AttentionInputs) -> Tensor:
    module = BlockTopKAttentionConfig(**fields).build(layer_spec(4, 2, causal=inputs.causal))
    out: Tensor = module(inputs)
    return out


def expected(fields: dict[str, Any], inputs: AttentionInputs) -> Tensor:
    config = BlockTopKAttentionConfig(**fields)
    rows = []
    for q, k, v in zip(inputs.query, inputs.key, inputs.value, strict=True):
        kept = cases.kept_pairs(config, q.detach(), k.detach(), inputs.causal, inputs.band.left)
        rows.append(cases.attention(q, k, v, kept, inputs.scale))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("fields", CASES, ids=ids)
@pytest.mark.parametrize("length", [1, 37, 130])
def test_outputs_and_gradients_are_those_of_the_definition(fields: dict[str, Any], causal: bool, length: int) -> None:
    if length == 130 and fields["block_size"] in (1, 7):
        pytest.skip("plain loops: the short length covers it")
    inputs = inputs_of(length, causal)
    out, oracle = run(fields, inputs), expected(fields, inputs)
    grad = draw(*out.shape, seed=9, dtype=torch.float64)
    ours = torch.autograd.grad(out, (inputs.query, inputs.key, inputs.value), grad)
    theirs = torch.autograd.grad(oracle, (inputs.query, inputs.key, inputs.value), grad)
    assert rms_ratio(out, oracle) < 1e-12
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("selection", ["query_block", "query"])
def test_engines_in_fp32(engine: str, causal: bool, selection: str) -> None:
    fields = {**SMALL, "block_size": 32, "selection": selection}
    exact = inputs_of(300, causal)
    single = {n: getattr(exact, n).detach().float().requires_grad_() for n in ("query", "key", "value")}
    inputs = replace(exact, **single, engine=engine)
    out, oracle = run(fields, inputs), run(fields, exact)
    grad = draw(*out.shape, seed=9)
    ours = torch.autograd.grad(out, (inputs.query, inputs.key, inputs.value), grad)
    theirs = torch.autograd.grad(oracle, (exact.query, exact.key, exact.value), grad.double())
    assert rms_ratio(out, oracle) < 2e-6
    assert all(rms_ratio(a, b) < 5e-6 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("fields", [SMALL, {**SMALL, "selection": "query"}, {**SMALL, "block_size": 16}], ids=ids)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_the_models_own_window_is_intersected(fields: dict[str, Any], causal: bool) -> None:
    inputs = inputs_of(50, causal, band=Band(15, 0 if causal else 15))
    assert rms_ratio(run(fields, inputs), expected(fields, inputs)) < 1e-12
    fields = {**fields, "drop_diagonal": True}
    assert rms_ratio(run(fields, inputs), expected(fields, inputs)) < 1e-12


@pytest.mark.parametrize("fields", [f for f in CASES if not f.get("drop_diagonal")], ids=ids)
def test_no_row_depends_on_later_tokens(fields: dict[str, Any]) -> None:
    """Each later token changed in turn, wildly: every row before it keeps its bits."""
    inputs = inputs_of(75, True)
    before = run(fields, inputs)
    for at in (1, 3, 4, 17, 31, 32, 48, 63, 74):
        moved = {n: getattr(inputs, n).detach().clone() for n in ("query", "key", "value")}
        for x in moved.values():
            x[:, :, at:] = -30 * x[:, :, at:]
        assert torch.allclose(run(fields, replace(inputs, **moved))[:, :, :at], before[:, :, :at], atol=1e-13)


@pytest.mark.parametrize("fields", [CASES[0], CASES[1], CASES[5], CASES[8]], ids=ids)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_padding_and_packing_change_nothing(fields: dict[str, Any], causal: bool) -> None:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :13], mask[1, 40:], mask[1, 5] = 0, 0, 0
    packed = torch.zeros(2, 60, dtype=torch.long)
    packed[:, 30:] = 1
    inputs = inputs_of(60, causal, sequences=Sequences.from_mask(2, 60, 60, mask, packed))
    out = run(fields, inputs)
    for row in range(2):
        for number in range(2):
            at = torch.nonzero((mask[row] == 1) & (packed[row] == number)).flatten()
            one = {n: getattr(inputs, n)[row : row + 1, :, at] for n in ("query", "key", "value")}
            alone = replace(inputs, **one, sequences=Sequences.full(1, len(at), len(at)))
            assert rms_ratio(out[row : row + 1, :, at], run(fields, alone)) < 1e-13
    assert float(out.detach().transpose(1, 2)[mask == 0].abs().max()) == 0.0


def test_equal_scores_go_to_the_lower_block() -> None:
    config = BlockTopKAttentionConfig(**SMALL)
    key = draw(1, 1, 4, 16).repeat(1, 1, 12, 1)  # all blocks are equal
    rows = (torch.arange(12) * 4, torch.arange(12) * 4 + 3)
    for dtype in (torch.float32, torch.float64):
        pooled = pooled_keys(key.to(dtype), 4, "mean")
        chosen = choose_blocks(draw(1, 1, 12, 16, dtype=dtype), pooled, rows, config.sets(True), Band(), 2)
        assert chosen[0, 0].tolist() == [[-1, -1], [-1, -1], [1, -1], *([[1, 2]] * 9)]


def test_everything_covered_is_dense() -> None:
    inputs = inputs_of(50, True)
    fields = {**SMALL, "top_k": 12}
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=True
    )
    for selection in ("query", "query_block"):
        assert rms_ratio(run({**fields, "selection": selection}, inputs), dense) < 1e-12


@pytest.mark.parametrize("fields", [CASES[0], CASES[1], CASES[2], CASES[5], CASES[8]], ids=ids)
@pytest.mark.parametrize("cuts", [(20, 21, 22, 40, 41, 75), (1, 75), (74, 75)], ids=str)
def test_steps_read_the_pooled_keys_kept_beside_the_cache(fields: dict[str, Any], cuts: tuple[int, ...]) -> None:
    """A step pools the keys of new blocks alone, and chooses and reads as the whole forward does."""
    inputs = inputs_of(75, True)
    module = BlockTopKAttentionConfig(**fields).build(layer_spec(4, 2, causal=True))
    whole, queries, start, out = module(inputs), Memory(), 0, []
    for end in cuts:
        part = {n: getattr(inputs, n)[:, :, :end] for n in ("key", "value")}
        step = replace(
            inputs, query=inputs.query[:, :, start:end], **part, sequences=Sequences.full(2, end - start, end),
            remember=queries, beside=queries.beside,
        )  # fmt: skip
        out.append(module(step))
        block, pooled = fields["block_size"], queries.made["pooled"]
        complete = inputs.key[:, :, : end // block * block]
        assert torch.equal(pooled, pooled_keys(complete, block, module.config.pooling))
        queries.made["pooled"], start = pooled.clone(), end
    assert rms_ratio(torch.cat(out, 2), whole) < 1e-13


@pytest.mark.parametrize("fields", CASES, ids=ids)
@pytest.mark.parametrize("left", [None, 30])
def test_steps_in_place_choose_as_the_whole_forward(fields: dict[str, Any], left: int | None) -> None:
    inputs = inputs_of(75, True, band=Band(left, 0))
    inputs = replace(inputs, **{n: getattr(inputs, n).detach().float() for n in ("query", "key", "value")})
    module = BlockTopKAttentionConfig(**fields).build(layer_spec(4, 2, causal=True)).eval()
    whole, memory, start, out = module(inputs), Memory(), 0, []
    for end in (60, 61, 62, 66, 75):
        part = {n: getattr(inputs, n)[:, :, :end] for n in ("key", "value")}
        step = replace(
            inputs, query=inputs.query[:, :, start:end], **part, sequences=Sequences.full(2, end - start, end),
            remember=memory, beside=memory.beside,
        )  # fmt: skip
        out.append(module(step))
        start = end
    assert rms_ratio(torch.cat(out, 2), whole) < 1e-6


@pytest.mark.parametrize("selection", ["query", "query_block"])
def test_the_bare_operator_serves_it(selection: str) -> None:
    fields = {**SMALL, "selection": selection}
    inputs = inputs_of(50, True)
    config = BlockTopKAttentionConfig(**fields)
    out = sparse_attention(inputs.query, inputs.key, inputs.value, config, causal=True)
    assert rms_ratio(out, expected(fields, inputs)) < 1e-12
    oracle = sparse_attention(inputs.query, inputs.key, inputs.value, config, causal=True, engine="reference")
    assert rms_ratio(oracle, out) < 1e-12
    with pytest.raises(NotStaticError, match="block_topk"):
        config.mask(16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"num_window_blocks": 0}, "num_window_blocks=0"),
        ({"num_sink_blocks": -1}, "num_sink_blocks=-1"),
        ({"selection": "block"}, "query_block"),
        ({"pooling": "sum"}, "mean"),
        ({"shared_by_group": 1}, "True or False"),
        ({"indexer": 1}, "True or False"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        BlockTopKAttentionConfig(**fields)


def test_what_a_layer_cannot_run_is_refused() -> None:
    with pytest.raises(SparseAttentionError, match="nearest: 1 or 3"):
        BlockTopKAttentionConfig().build(layer_spec(causal=False))
    with pytest.raises(SparseAttentionError, match="nearest: 1 or 3"):
        sparse_attention(*(draw(1, 1, 8, 16) for _ in range(3)), BlockTopKAttentionConfig())
    spec = replace(layer_spec(4, 3, causal=True), heads=(0, 1, 2), whole_groups=False)
    with pytest.raises(SparseAttentionError, match="whole groups"):
        BlockTopKAttentionConfig().build(spec)
    BlockTopKAttentionConfig(shared_by_group=False).build(spec)


def test_a_few_last_queries_of_the_bare_operator() -> None:
    inputs = inputs_of(50, True)
    tensors = (inputs.key, inputs.value)
    for fields, last in (({**SMALL, "selection": "query"}, 3), ({**SMALL, "selection": "query"}, 1), (SMALL, 50)):
        config = BlockTopKAttentionConfig(**fields)
        out = sparse_attention(inputs.query[:, :, -last:], *tensors, config, causal=True)
        assert rms_ratio(out, expected(fields, inputs)[:, :, -last:]) < 1e-12
    with pytest.raises(SparseAttentionError, match="by the queries of block 11"):
        sparse_attention(inputs.query[:, :, -2:], *tensors, BlockTopKAttentionConfig(**SMALL), causal=True)
    with pytest.raises(SparseAttentionError, match="must be equal"):
        sparse_attention(inputs.query[:, :, -2:], *tensors, BlockTopKAttentionConfig(**SMALL))


def test_presets() -> None:
    moba = BlockTopKAttentionConfig.preset("moba")
    assert (moba.block_size, moba.top_k, moba.num_window_blocks, moba.num_sink_blocks) == (512, 3, 1, 0)
    infllm = BlockTopKAttentionConfig.preset("infllm-v2")
    assert (infllm.block_size, infllm.top_k, infllm.num_window_blocks, infllm.num_sink_blocks) == (64, 16, 32, 1)


def test_what_is_chosen_is_told() -> None:
    module = BlockTopKAttentionConfig(**SMALL).build(layer_spec(4, 2, causal=True))
    assert module.figures() == {}
    module(inputs_of(48, True))
    # 12 blocks, sink 0, own; block I chooses min(2, I - 1): 0, 0, 1, then 2.
    assert module.figures()["blocks_chosen"] == (0 + 0 + 1 + 9 * 2) / 12
    assert 1 <= module.figures()["blocks_back"] <= 10


@pytest.mark.parametrize("shape", [(1, 100, 100), (16, 100, 100), (48, 30, 130), (64, 200, 200)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_lists_of_fixed_capacity_hold_the_same_pairs(
    shape: tuple[int, int, int], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off the CPU no length of a list is read: the entries past the last row belong to none."""
    block, n_q, n_k = shape
    sets = BlockSets(block, 1, 1, causal)
    n_q = n_q if causal else n_k
    own = torch.arange((n_k - n_q) // block, -(-n_k // block))
    pooled, vectors = draw(2, 2, -(-n_k // block), 8), draw(2, 2, len(own), 8, seed=1)
    chosen = choose_blocks(vectors, pooled, (own * block, own * block + block - 1), sets, Band(), 2)
    data = PlanData(n_q, n_k, (chosen,), (*map(int, sets), 0, 0, None, None), ScoreOptions(1.0))
    band = Band(None, 0) if causal else Band()
    expected = kept_pairs(chosen, sets, False, n_q, n_k, band, False).long()
    for exact in (True, False):
        for module in ("sa_hf.patterns.block_sets", "sa_hf.ops.data_layout"):
            monkeypatch.setattr(f"{module}.exact_lists", lambda device, exact=exact: exact)
        parts = plan_parts(data)
        total = sum(part_multiplicity(part, n_q, n_k) for part in parts)
        assert torch.equal(torch.as_tensor(total).expand(expected.shape), expected)
        for part in parts:
            layout = part.layout
            assert exact == (layout.longest is None)
            rows = layout.row_count
            assert exact or int(rows.max()) <= layout.longest
            used = layout.columns[: int(layout.row_start[-1])]
            assert exact or int(torch.bincount(used, minlength=1).max()) <= layout.longest * layout.batch * layout.heads


def moba(query: Tensor, key: Tensor, value: Tensor, chunk: int, top_k: int) -> Tensor:
    """MoBA as published (its section 2.2), one head ``[n, d]``: the gate is the product of a query with a chunk's mean
    key, +inf for its own chunk, -inf for later ones; of the ``top_k`` chunks with the highest gate it reads all keys
    that are not behind it."""
    n, scale = len(query), query.shape[-1] ** -0.5
    means = torch.stack([piece.mean(0) for piece in key.split(chunk)])
    gate = query @ means.T
    own = torch.arange(n) // chunk
    chunks = torch.arange(len(means))
    gate = gate.masked_fill(chunks > own[:, None], -torch.inf).masked_fill(chunks == own[:, None], torch.inf)
    best = gate.topk(min(top_k, len(means)), dim=-1)
    picked = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best.indices, best.values > -torch.inf)
    kept = picked[:, own] & (torch.arange(n) <= torch.arange(n)[:, None])
    return torch.softmax((query @ key.T * scale).masked_fill(~kept, -torch.inf), -1) @ value


@pytest.mark.parametrize("length", [12, 61, 96])
def test_moba_as_published(length: int) -> None:
    """A second definition, of other hands' making: its top 4 are the own block and our top 3."""
    inputs = inputs_of(length, True)
    fields = {**BlockTopKAttentionConfig.presets()["moba"], "block_size": 8}
    out = run(fields, inputs)
    for row in range(2):
        for head in range(4):
            of = (inputs.query[row, head], inputs.key[row, head // 2], inputs.value[row, head // 2])
            assert rms_ratio(out[row, head], moba(*of, 8, fields["top_k"] + 1)) < 1e-12


def test_a_batch_of_padding_alone_has_gradients() -> None:
    """As under the static patterns: processes that train together wait for each other's."""
    tensors = [torch.full((1, 2, 6, 8), value, requires_grad=True) for value in (1.0, math.inf, math.nan)]
    config, mask = BlockTopKAttentionConfig(block_size=2, num_window_blocks=1), torch.zeros(1, 6, dtype=torch.long)
    out = sparse_attention(*tensors, config, causal=True, attention_mask=mask)
    out.sum().backward()
    assert not out.any()
    assert all(x.grad is not None and not x.grad.any() for x in tensors)
