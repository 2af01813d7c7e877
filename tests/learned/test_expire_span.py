"""Expire-Span: against plain loops in fp64, its gradients, its cache and its segments."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from learned_cases import Memory, attention_inputs, draw, layer_spec, padded_and_packed, rms_ratio
from torch import Tensor

from sa_hf.errors import NotStaticError, SparseAttentionError
from sa_hf.layer import AttentionInputs
from sa_hf.ops.data_layout import expiring_layout
from sa_hf.ops.parts import Band
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.expire_span import ExpireSpanAttention, ExpireSpanAttentionConfig


def build(heads: int = 2, kv_heads: int | None = None, spread: bool = True, **fields: object) -> ExpireSpanAttention:
    """A module whose spans differ from key to key."""
    config = ExpireSpanAttentionConfig(**{"max_span": 40, "ramp": 6, **fields})
    module = config.build(layer_spec(heads, kv_heads, causal=True))
    if spread:
        with torch.no_grad():
            module.weight.copy_(draw(*module.weight.shape, seed=11) * 0.3)
            module.bias.fill_(-1.0)
    return module


def oracle(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, scale: float,
    max_span: float, ramp: float, limit: float = math.inf, left: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Row by row from section 5: the output and the mean span."""
    batch, heads, n, _ = query.shape
    group = heads // key.shape[1]
    spans = max_span * torch.sigmoid(hidden @ weight.t() + bias)  # [B, N, S]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                first = 0 if left is None else max(0, i - left)
                j = torch.arange(first, i + 1)
                e = spans[b, first : i + 1, h if weight.shape[0] > 1 else 0].clamp(max=limit)
                m = torch.where(j == i, 1.0, torch.clamp(1 + (e - (i - j)) / ramp, 0, 1))
                total = m * torch.exp(key[b, h // group, first : i + 1] @ query[b, h, i] * scale)
                rows.append((total[:, None] * value[b, h // group, first : i + 1]).sum(0) / total.sum())
    return torch.stack(rows).view(query.shape), spans.mean()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("window", [None, 9])
def test_output_and_every_gradient_match_the_oracle(
    per_head: bool, kv_heads: int, length: int, window: int | None
) -> None:
    module = build(kv_heads=kv_heads, per_head=per_head, span_loss_coef=0.01).train()
    inputs = attention_inputs(batch=1, kv_heads=kv_heads, length=length, causal=True, band=Band(window, None))
    out = module(inputs)
    upstream = draw(*out.shape, seed=9)
    leaves = [inputs.query, inputs.key, inputs.value, inputs.hidden_states, module.weight, module.bias]
    loss = (out * upstream).sum() + module.aux_losses()["expire_span"]
    grads = torch.autograd.grad(loss, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, mean = oracle(*exact, inputs.scale, 40, 6, left=window)
    wanted = torch.autograd.grad((expected * upstream).sum() + 0.01 * mean, exact)
    assert rms_ratio(out, expected) < 1e-5
    for ours, theirs in zip(grads, wanted, strict=True):
        assert rms_ratio(ours, theirs) < 2e-5 or float(theirs.abs().max()) < 1e-12
    assert math.isclose(module.figures()["mean_span"], float(mean.detach()), rel_tol=1e-5)


def test_patched_layer_is_unchanged_within_the_initial_span() -> None:
    inputs = attention_inputs(length=40, causal=True)
    dense = torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=True)
    assert rms_ratio(build(spread=False, max_span=40)(inputs), dense) < 1e-5  # 0.98 * 40 >= 39
    assert rms_ratio(build(spread=False, max_span=400, initial_span=39.0)(inputs), dense) < 1e-5
    assert rms_ratio(build(spread=False, max_span=400, initial_span=20.0)(inputs), dense) > 1e-3


def test_random_shortening_is_one_draw_per_step_for_all_layers() -> None:
    module = build(random_shortening=True, span_loss_coef=1.0).train()
    while not 0.05 < float(module.uniform(1, layer=0)) < 0.2:
        module.advance_step()
    inputs = attention_inputs(batch=1, length=30, causal=True)
    out = module(inputs)
    other = ExpireSpanAttentionConfig(max_span=40, ramp=6).build(layer_spec(causal=True, layer=1))
    other.step.copy_(module.step)
    limit = float(other.uniform(1, layer=0)) * 40
    exact = [x.detach().double() for x in (inputs.query, inputs.key, inputs.value, inputs.hidden_states)]
    expected, mean = oracle(*exact, module.weight.double(), module.bias.double(), inputs.scale, 40, 6, limit)
    unlimited, _ = oracle(*exact, module.weight.double(), module.bias.double(), inputs.scale, 40, 6)
    assert rms_ratio(out, expected) < 1e-5
    assert rms_ratio(out, unlimited) > 1e-3
    assert rms_ratio(module.eval()(inputs), unlimited) < 1e-5
    assert math.isclose(float(module.aux_losses()["expire_span"]), float(mean), rel_tol=1e-5)


def test_padding_and_packing_equal_each_sequence_alone() -> None:
    module = build(span_loss_coef=1.0).train()
    inputs = attention_inputs(batch=3, length=24, causal=True, sequences=padded_and_packed())
    out = module(inputs)
    grad = torch.autograd.grad(out.square().sum(), module.weight)[0]
    loss = float(module.aux_losses()["expire_span"].detach())
    total, spans, count = torch.zeros_like(grad), 0.0, 0
    for row, slots in ((0, range(7, 24)), (1, range(15)), (2, [*range(3), *range(4, 9), 10, 11]), (2, range(12, 24))):
        at = torch.tensor(list(slots))
        alone = copy.copy(inputs)
        alone.query, alone.key, alone.value = (
            x[row : row + 1, :, at] for x in (inputs.query, inputs.key, inputs.value)
        )
        alone.hidden_states = inputs.hidden_states[row : row + 1, at]
        alone.sequences = Sequences.full(1, len(at), len(at))
        single = module(alone)
        assert rms_ratio(out[row : row + 1, :, at], single) < 1e-6
        total += torch.autograd.grad(single.square().sum(), module.weight)[0]
        spans += float(module.aux_losses()["expire_span"].detach()) * len(at)
        count += len(at)
    assert rms_ratio(grad, total) < 1e-5
    assert math.isclose(loss, spans / count, rel_tol=1e-5)


def test_a_token_changes_no_earlier_output() -> None:
    module = build().eval()
    inputs = attention_inputs(batch=1, length=50, causal=True)
    before = module(inputs)
    for tensor in (inputs.query, inputs.key, inputs.value):
        tensor.data[:, :, 30] += 1
    inputs.hidden_states.data[:, 30] += 1
    after = module(inputs)
    assert torch.equal(before[:, :, :30], after[:, :, :30])
    assert not torch.equal(before[:, :, 30:], after[:, :, 30:])


def _steps(module: ExpireSpanAttention, inputs: AttentionInputs, cuts: list[int]) -> tuple[Tensor, Memory]:
    memory, outs, begin = Memory(), [], 0
    for end in [*cuts, inputs.query.shape[2]]:
        step = copy.copy(inputs)
        step.query, step.key, step.value = (
            inputs.query[:, :, begin:end],
            inputs.key[:, :, :end],
            inputs.value[:, :, :end],
        )
        step.hidden_states = inputs.hidden_states[:, begin:end]
        step.sequences = Sequences.full(inputs.query.shape[0], end - begin, end)
        step.remember = memory
        outs.append(module(step))
        begin = end
    return torch.cat(outs, dim=2), memory


def test_decoding_reproduces_the_forward_and_eviction_is_lossless() -> None:
    module = build(per_head=True).eval()
    inputs = attention_inputs(length=64, causal=True)
    whole = module(inputs)
    stepped, memory = _steps(module, inputs, [40, 41, 42, 63])
    assert rms_ratio(stepped, whole) < 1e-5
    assert sorted(memory.kept) == ["spans"]

    # Keys that are evictable before the last step: garbage there changes nothing, anywhere else it does.
    before_last = copy.copy(inputs)
    before_last.query, before_last.key, before_last.value = (
        x[:, :, :63] for x in (inputs.query, inputs.key, inputs.value)
    )
    before_last.hidden_states, before_last.sequences = inputs.hidden_states[:, :63], Sequences.full(2, 63, 63)
    module(before_last)
    expired = module.expired_keys()
    assert expired is not None
    assert expired.any()
    assert module.figures()["tokens_kept"] == float((~expired).sum()) / 2
    for garbage, unchanged in ((expired, True), (~expired, False)):
        last = copy.copy(inputs)
        wrong = torch.nn.functional.pad(garbage, (0, 1))[:, None, :, None]
        last.key, last.value = (x.detach().masked_fill(wrong, 9.0) for x in (inputs.key, inputs.value))
        last.query, last.hidden_states = inputs.query[:, :, 63:], inputs.hidden_states[:, 63:]
        last.sequences, last.remember = Sequences.full(2, 1, 64), Memory()
        last.remember.kept = {"spans": memory.kept["spans"][:, :, :63]}
        assert (rms_ratio(module(last), whole[:, :, 63:]) < 1e-5) is unchanged


def test_a_step_of_decoding_has_the_loss_of_its_token() -> None:
    module = ExpireSpanAttentionConfig(max_span=8, ramp=4, span_loss_coef=0.5).build(layer_spec(2, causal=True)).eval()
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    inputs, memory = attention_inputs(2, 2, length=9, causal=True), Memory()
    spans = module.spans(inputs.hidden_states)
    with torch.no_grad():
        for begin, end in ((0, 8), (8, 9)):
            part = {n: getattr(inputs, n)[:, :, :end] for n in ("key", "value")}
            step = replace(
                inputs, query=inputs.query[:, :, begin:end], **part, hidden_states=inputs.hidden_states[:, begin:end],
                sequences=Sequences.full(2, end - begin, end), remember=memory,
            )  # fmt: skip
            module(step)
            torch.testing.assert_close(copy.deepcopy(module).aux_losses(), module.aux_losses())
            torch.testing.assert_close(module.unscaled_losses()["expire_span"], spans[:, :, begin:end].mean())
            torch.testing.assert_close(module.aux_losses()["expire_span"], spans[:, :, begin:end].mean() / 2)


def test_segments_recompute_spans_from_remembered_inputs() -> None:
    """Spans beyond one segment get a gradient: that of the whole sequence with earlier inputs held fixed."""
    module = build().train()
    inputs = attention_inputs(batch=1, length=48, causal=True)
    out, memory = _steps(module, inputs, [16, 32])
    assert sorted(memory.kept) == ["inputs"]
    assert rms_ratio(out, module(inputs)) < 1e-5
    ours = torch.autograd.grad(out[:, :, 32:].square().sum(), module.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(module(inputs)[:, :, 32:].square().sum(), module.weight)[0]
    assert rms_ratio(ours, theirs) < 1e-4
    # The inputs of earlier segments are detached: the last segment's output leaves no gradient there.
    hidden = torch.autograd.grad(out[:, :, 32:].square().sum(), inputs.hidden_states)[0]
    assert float(hidden[:, :32].abs().max()) == 0 < float(hidden[:, 32:].abs().max())
    module.eval()
    step = copy.copy(inputs)
    step.query, step.hidden_states = inputs.query[:, :, 47:], inputs.hidden_states[:, 47:]
    step.sequences, step.remember = Sequences.full(1, 1, 48), memory
    with pytest.raises(SparseAttentionError, match="training"):
        module(step)


def test_dead_tiles_are_left_out() -> None:
    spans = torch.zeros(2, 1, 640)
    spans[1, 0, 5] = 600.0
    layout = expiring_layout(spans, 640, ramp=4, left=639)
    counts = layout.row_count
    assert counts[0, 0].tolist() == [1] + [2] * 9  # own block, and the ramp of the one before
    assert counts[1, 0].tolist() == [1, 2] + [3] * 8  # 5 + 600 + 4 > 576, the first query of the last block
    assert layout.columns[int(layout.row_start[19]) : int(layout.row_start[20])].tolist() == [0, 8, 9]


def test_a_key_leaves_the_cache_where_its_tiles_end() -> None:
    """In fp32 the span and the ramp are 100,000 together, and would lose what is left of the weight there."""
    module = build(max_span=2**18, ramp=100_000)
    spans = torch.tensor([[[0.001]]])
    assert 1 + (float(spans) - 100_000) / 100_000 > 0
    assert not bool(module.evictable(100_000, spans))
    assert bool(module.evictable(100_001, spans))


def test_lists_of_fixed_capacity_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs: no length is read from the device, and spare entries belong to no row."""
    module = build(per_head=True, max_span=400)
    module.bias.data.fill_(-4.0)
    inputs = attention_inputs(length=300, causal=True)
    leaves = (inputs.query, inputs.key, inputs.value, module.weight, module.bias)
    expected = module(inputs)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    monkeypatch.setattr("sa_hf.ops.data_layout.exact_lists", lambda device: False)
    layout = expiring_layout(module.spans(inputs.hidden_states), 300, 6, 405)
    assert int(layout.row_start[-1]) < len(layout.columns)
    out = module(inputs)
    assert rms_ratio(out, expected) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), leaves), wanted, strict=True):
        assert rms_ratio(ours, theirs) < 1e-6


def test_checkpointing_gives_equal_gradients_and_one_loss() -> None:
    module = build(random_shortening=True, span_loss_coef=0.5).train()
    module.advance_step()
    inputs = attention_inputs(length=40, causal=True, dropout=0.2)

    def run(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(1)

        def layer(query: Tensor, hidden: Tensor) -> Tensor:
            call = copy.copy(inputs)
            call.query, call.hidden_states = query, hidden
            return module(call)

        arguments = inputs.query, inputs.hidden_states
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
        else:
            out = layer(*arguments)
        loss = out.square().sum() + module.aux_losses()["expire_span"]
        module.drop_graph()
        grads = torch.autograd.grad(loss, [*arguments, module.weight, module.bias])
        assert all(not loss.requires_grad for loss in module.aux_losses().values())
        module._may_keep_graph = True
        return [out, *grads]

    for plain, again in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, again)


def test_loss_weight_shortens_spans() -> None:
    lengths = []
    for coef in (0.0, 0.05, 5.0):
        module = build(spread=False, span_loss_coef=coef, max_span=32, ramp=4).train()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for step in range(40):
            inputs = attention_inputs(batch=2, length=24, causal=True, seed=7 * step)
            dense = torch.nn.functional.scaled_dot_product_attention(
                inputs.query, inputs.key, inputs.value, is_causal=True
            )
            loss = 10 * (module(inputs) - dense.detach()).square().mean() + module.aux_losses()["expire_span"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        lengths.append(module.figures()["mean_span"])
    assert lengths[0] > lengths[1] > lengths[2]


def test_corridor_keeps_the_informative_token_and_forgets_the_blanks() -> None:
    """The last query needs the value of one marked token far back; blanks carry nothing. Spans alone are trained."""
    length, width = 40, 16
    module = build(heads=1, spread=False, span_loss_coef=0.02, max_span=64, ramp=8).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for step in range(120):
        generator = torch.Generator().manual_seed(step)
        at = int(torch.randint(2, 8, (), generator=generator))
        hidden = torch.zeros(1, length, width)
        hidden[0, :, 1] = 1.0
        hidden[0, at, :2] = torch.tensor([1.0, 0.0])
        value = torch.zeros(1, 1, length, width)
        value[0, 0, at, 0] = 1.0
        query = torch.zeros(1, 1, length, width)
        inputs = AttentionInputs(
            query, torch.zeros_like(query), value, Sequences.full(1, length, length), True, 0.25, hidden_states=hidden
        )
        out = module(inputs)[0, 0, -1, 0]
        loss = (1 - out).square() * 5 + module.aux_losses()["expire_span"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    blank, informative = torch.zeros(1, 2, width), torch.tensor([1, 0])
    blank[0, 0, 0] = 1.0
    blank[0, 1, 1] = 1.0
    spans = module.spans(blank)[0, 0]
    assert spans[informative[1]] > 30  # reaches from the first positions to the end
    assert spans[informative[0]] < 8


def test_errors() -> None:
    for bad in (
        {"max_span": 0}, {"ramp": 0}, {"initial_span": 0.0}, {"initial_span": 1024.0}, {"span_loss_coef": -1.0},
        {"per_head": 1}, {"drop_diagonal": True},
    ):  # fmt: skip
        with pytest.raises(SparseAttentionError, match=next(iter(bad))):
            ExpireSpanAttentionConfig(**bad)
    with pytest.raises(SparseAttentionError, match="causal only"):
        ExpireSpanAttentionConfig().build(layer_spec(causal=False))
    with pytest.raises(NotStaticError):
        ExpireSpanAttentionConfig().mask(8)
    inputs = attention_inputs(causal=True)
    inputs.hidden_states = None
    with pytest.raises(SparseAttentionError, match="hidden_states"):
        build()(inputs)
    preset = ExpireSpanAttentionConfig.preset("enwik8")
    assert (preset.max_span, preset.ramp, preset.random_shortening) == (16384, 128, True)
    assert ExpireSpanAttentionConfig.from_dict(preset.to_dict()) == preset
