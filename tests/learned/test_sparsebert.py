"""SparseBERT: the learned mask against plain loops in fp64, its gradients, its noise and its frozen form."""

from __future__ import annotations

import copy

import pytest
import torch
from learned_cases import attention_inputs, build_sparsebert, draw, layer_spec, rms_ratio, scatter_logits
from torch import Tensor

import sa_hf
from sa_hf.errors import NotStaticError, SparseAttentionError
from sa_hf.ops.parts import Band, OffsetsPart
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.frozen_mask import frozen_plan
from sa_hf.patterns.sparsebert import SparseBertAttention, SparseBertAttentionConfig


def oracle(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scale: float, causal: bool, drop_diagonal: bool = False,
    left: int | None = None,
) -> Tensor:  # fmt: skip
    """Row by row from section 4. ``gate`` is fp64 ``[H, L]`` (by distance) or ``[H, L, L]`` (by pair)."""
    batch, heads, n, _ = query.shape
    group = heads // key.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                weights, scores, values = [], [], []
                for j in range(i + 1 if causal else n):
                    distance = abs(i - j)
                    in_reach = gate.dim() == 3 or distance < gate.shape[1]
                    if not in_reach or (drop_diagonal and i == j) or (left is not None and i - j > left):
                        continue
                    weights.append(gate[h, i, j] if gate.dim() == 3 else gate[h, distance])
                    scores.append(query[b, h, i] @ key[b, h // group, j] * scale)
                    values.append(value[b, h // group, j])
                if not weights or all(float(w.detach()) == 0 for w in weights):
                    weights.append(torch.ones((), dtype=query.dtype))
                    scores.append(query[b, h, i] @ key[b, h // group, i] * scale)
                    values.append(value[b, h // group, i])
                total = torch.stack(weights) * torch.exp(torch.stack(scores))
                rows.append((total[:, None] * torch.stack(values)).sum(0) / total.sum())
    return torch.stack(rows).view(query.shape)


STRUCTURES = ("structured", "unstructured")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_sampled_mask_and_gradients_match_the_oracle(causal: bool, structure: str, hard: bool, kv_heads: int) -> None:
    module = build_sparsebert(kv_heads=kv_heads, causal=causal, structure=structure, hard=hard, drop_diagonal=not hard)
    scatter_logits(module)
    module.train()
    module.advance_step()
    length = 13 if structure == "unstructured" else 21  # structured: some distances are beyond mask_length
    inputs = attention_inputs(batch=1, kv_heads=kv_heads, length=length, causal=causal)
    out = module(inputs)
    upstream = draw(*out.shape, seed=9)
    leaves = [inputs.query, inputs.key, inputs.value, module.logits]
    grads = torch.autograd.grad((out * upstream).sum(), leaves)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    # The noise is the module's own: two Gumbel draws per logit, from (seed, step, layer, element).
    first, second = (module.uniform(module.logits.numel(), layer=0, stream=s).view_as(module.logits) for s in (0, 1))
    noise = (-torch.log(-torch.log(first)) + torch.log(-torch.log(second))).float().double()
    soft = torch.sigmoid(exact[3] + noise)
    gate = (soft > 0.5).double() + (soft - soft.detach()) if hard else soft
    expected = oracle(*exact[:3], gate, inputs.scale, causal, drop_diagonal=not hard)
    wanted = torch.autograd.grad((expected * upstream).sum(), exact)
    assert rms_ratio(out, expected) < 1e-5
    for ours, theirs in zip(grads, wanted, strict=True):
        assert rms_ratio(ours, theirs) < 1e-5


@pytest.mark.parametrize("structure", STRUCTURES)
def test_dropped_keys_receive_a_gradient(structure: str) -> None:
    module = build_sparsebert(structure=structure)
    scatter_logits(module, keep=0.2)
    module.train()
    out = module(attention_inputs(length=16))
    out.square().sum().backward()
    assert module.logits is not None
    assert module.logits.grad is not None
    dropped = module.gate().detach() == 0
    assert dropped.any()
    assert (module.logits.grad[dropped] != 0).float().mean() > 0.9


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_frozen_equals_deterministic_and_the_oracle(causal: bool, structure: str, drop_diagonal: bool) -> None:
    module = build_sparsebert(causal=causal, structure=structure, mask_length=80, drop_diagonal=drop_diagonal)
    scatter_logits(module, keep=0.05)  # sparse enough that some rows keep nothing
    module.eval()
    inputs = attention_inputs(batch=1, length=75, causal=causal)
    leaves = (inputs.query, inputs.key, inputs.value)
    out = module(inputs)
    expected = oracle(*(x.double() for x in leaves), module.gate().double(), inputs.scale, causal, drop_diagonal)
    assert rms_ratio(out, expected) < 1e-5
    assert module.mask(75).any(-1).all()

    frozen = copy.deepcopy(module)
    frozen.freeze()
    sparse = frozen(inputs)
    upstream = draw(*out.shape, seed=9)
    assert rms_ratio(sparse, out) < 1e-5
    for ours, theirs in zip(
        torch.autograd.grad((sparse * upstream).sum(), leaves),
        torch.autograd.grad((out * upstream).sum(), leaves),
        strict=True,
    ):
        assert rms_ratio(ours, theirs) < 1e-5
    assert torch.equal(frozen.mask(75), module.mask(75))
    if structure == "structured":
        assert isinstance(
            frozen_plan(frozen.keep_table(), 75, 75, Band(None, 0 if causal else None), drop_diagonal)[0], OffsetsPart
        )

    restored = frozen.config.build(module.spec)
    restored.load_state_dict(frozen.state_dict())
    restored.eval()
    assert torch.equal(restored(inputs), sparse)
    assert "logits" not in frozen.state_dict()
    assert frozen.config == SparseBertAttentionConfig.from_dict(frozen.config.to_dict())


@pytest.mark.parametrize("keep", [0.1, 0.7])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_frozen_decoding_step_is_the_row_of_the_whole(structure: str, keep: float) -> None:
    module = build_sparsebert(causal=True, structure=structure, mask_length=40)
    scatter_logits(module, keep=keep)
    module.freeze()
    inputs = attention_inputs(length=33, causal=True)
    whole = module(inputs)
    for begin in (0, 5, 32):
        inputs_step = copy.copy(inputs)
        inputs_step.query = inputs.query[:, :, begin:]
        inputs_step.sequences = Sequences.full(2, 33 - begin, 33)
        assert rms_ratio(module(inputs_step), whole[:, :, begin:]) < 1e-5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_padding_packing_and_the_models_window(structure: str, frozen: bool) -> None:
    module = build_sparsebert(structure=structure, causal=True)
    scatter_logits(module)
    module.eval()
    if frozen:
        module.freeze()
    mask = torch.ones(3, 15, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 9:] = 0
    mask[2, [2, 7]] = 0
    ids = torch.zeros(3, 15, dtype=torch.long)
    ids[2, 6:] = 1
    inputs = attention_inputs(batch=3, length=15, causal=True, band=Band(5, None))
    inputs.sequences = Sequences.from_mask(3, 15, 15, mask, ids)
    out = module(inputs)
    assert torch.equal(out[mask[:, None, :, None].expand_as(out) == 0], torch.zeros(int((mask == 0).sum()) * 2 * 16))
    for row, slots in ((0, range(4, 15)), (1, range(9)), (2, (0, 1, 3, 4, 5)), (2, (6, *range(8, 15)))):
        at = torch.tensor(list(slots))
        alone = [x[row : row + 1, :, at].double() for x in (inputs.query, inputs.key, inputs.value)]
        expected = oracle(*alone, module.gate().double(), inputs.scale, causal=True, left=5)
        assert rms_ratio(out[row : row + 1, :, at], expected) < 1e-5


def test_chunks_of_rows_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_sparsebert(causal=True, mask_length=32)
    scatter_logits(module)
    module.train()
    inputs = attention_inputs(length=50, causal=True)
    leaves = (inputs.query, inputs.key, inputs.value, module.logits)
    out = module(inputs)
    whole = torch.autograd.grad(out.square().sum(), leaves)
    monkeypatch.setattr("sa_hf.ops.gated.SCORES_AT_ONCE", 1)
    chunked = module(inputs)
    assert rms_ratio(chunked, out) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(chunked.square().sum(), leaves), whole, strict=True):
        assert rms_ratio(ours, theirs) < 1e-5


def test_noise_is_a_function_of_the_step() -> None:
    module = build_sparsebert().train()
    scatter_logits(module, keep=0.5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = module.gate()
    assert torch.equal(first, module.gate())
    module.advance_step()
    assert not torch.equal(first, module.gate())
    other = build_sparsebert().train()
    other.load_state_dict(module.state_dict())
    assert torch.equal(module.gate(), other.gate())
    assert torch.equal(torch.get_rng_state(), state)
    other.spec = layer_spec(layer=1)
    assert not torch.equal(module.gate(), other.gate())


def test_gate_has_the_probability_of_its_logit() -> None:
    module = build_sparsebert(mask_length=20000).train()
    assert module.logits is not None
    with torch.no_grad():
        module.logits.fill_(1.0)
    # P(logit + logistic noise > 0) = sigmoid(1); 40,000 draws: standard deviation 0.0022.
    assert abs(float(module.gate().detach().mean()) - torch.sigmoid(torch.tensor(1.0)).item()) < 0.01


def test_fresh_mask_is_dense_and_density_starts_near_one() -> None:
    module = build_sparsebert(mask_length=64).eval()
    inputs = attention_inputs(length=40)
    expected = torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)
    assert rms_ratio(module(inputs), expected) < 1e-5
    assert module.figures()["mask_density"] == 1.0
    module.train()(inputs)
    assert float(module.aux_losses()["sparsebert_density"].detach()) > 20 * 0.9


def _trained(density_coef: float, planted: bool, steps: int = 120) -> SparseBertAttention:
    """Trains the mask towards the value three back (queries that know nothing), or towards dense attention."""
    module = build_sparsebert(heads=1, causal=True, density_coef=density_coef, mask_length=12).train()
    optimizer = torch.optim.Adam([module.logits], lr=0.1, weight_decay=0.0)
    for step in range(steps):
        inputs = attention_inputs(batch=4, heads=1, length=20, causal=True, seed=10 * step)
        dense = torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=True)
        target = inputs.value[:, :, :-3] if planted else dense[:, :, 3:]
        if planted:
            inputs.query = torch.zeros_like(inputs.query)
        module.advance_step()
        loss = (module(inputs)[:, :, 3:] - target.detach()).square().mean() + module.aux_losses()["sparsebert_density"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


@pytest.mark.parametrize("density_coef", [0.0, 0.2])
def test_planted_offset_is_found(density_coef: float) -> None:
    assert _trained(density_coef, planted=True).keep_table()[0].nonzero().flatten().tolist() == [3]


def test_more_weight_means_less_density() -> None:
    densities = [_trained(coef, planted=False).density(20) for coef in (0.0, 0.6, 20.0)]
    assert densities[0] > densities[1] > densities[2]


def test_errors_and_registry() -> None:
    assert sa_hf.available_patterns()["sparsebert"] is SparseBertAttentionConfig
    with pytest.raises(NotStaticError):
        SparseBertAttentionConfig().mask(8)
    with pytest.raises(SparseAttentionError, match="mask_length=16"):
        build_sparsebert(structure="unstructured")(attention_inputs(length=17))
    for bad in ({"structure": "toeplitz"}, {"mask_length": 0}, {"temperature": 0.0}, {"density_coef": -1}, {"hard": 1}):
        with pytest.raises(SparseAttentionError, match=next(iter(bad))):
            SparseBertAttentionConfig(**bad)


def test_dropout_is_equal_in_recomputation_and_keeps_the_mean() -> None:
    module = build_sparsebert(mask_length=32, density_coef=0.0).train()
    inputs = attention_inputs(length=32, dropout=0.5)
    torch.manual_seed(3)
    first = module(inputs)
    torch.manual_seed(3)
    assert torch.equal(first, module(inputs))
    inputs.value = torch.ones_like(inputs.value)
    assert abs(float(module(inputs).mean()) - 1) < 0.1


@pytest.mark.parametrize("structure", ["structured", "unstructured"])
def test_pairs_are_counted_in_fp32_whatever_the_default_dtype_is(structure: str) -> None:
    """bfloat16 holds whole numbers up to 256; the distances of a long input stand for more pairs than that."""
    config = SparseBertAttentionConfig(structure=structure, mask_length=40)
    module = SparseBertAttention(config, layer_spec())
    module._seen = [(301, 40, 40)]
    expected = module._pairs(torch.device("cpu"), Band())
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = module._pairs(torch.device("cpu"), Band())
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
