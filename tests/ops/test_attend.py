"""Batches: padding, holes, packing, dropout and checkpointing through the public operator and ``attend``."""

from __future__ import annotations

import pytest
import torch
from ops_cases import rms_ratio, shuffled, window_part
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sa_hf import SlidingWindowAttentionConfig, sparse_attention
from sa_hf.ops.attend import attend
from sa_hf.ops.choice import choose_engine
from sa_hf.ops.engine import Gradients
from sa_hf.ops.parts import Band, Part, ScoreOptions, SegmentPart
from sa_hf.ops.random import counter_words, dropout_keep, dropout_words, hash32
from sa_hf.ops.run import plan_backward, plan_forward
from sa_hf.ops.sequences import Sequences
from sa_hf.ops.slots import merge_into, put, take
from sa_hf.ops.tiles import TileEngine

CONFIG = SlidingWindowAttentionConfig(window=9, num_sink_tokens=2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def window_by_loops(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One sequence ``[H, n, D]`` in fp64, row by row: the 9 nearest positions and the first 2."""
    heads, n, d = q.shape
    group = heads // k.shape[0]
    rows = []
    for h in range(heads):
        for i in range(n):
            near = [j for j in range(n) if (abs(i - j) < 9 or j < 2) and (not causal or j <= i)]
            scores = (k[h // group, near].double() @ q[h, i].double()) * d**-0.5
            rows.append(torch.softmax(scores, 0) @ v[h // group, near].double())
    return torch.stack(rows).view(heads, n, d)


MASKS = {
    "right": [[1] * 20, [1] * 13 + [0] * 7, [1] + [0] * 19],
    "left": [[1] * 20, [0] * 7 + [1] * 13, [0] * 19 + [1]],
    "inside": [[1, 0] * 10, [0] * 3 + [1] * 5 + [0] * 4 + [1] * 8, [1] * 20],
    "a row of padding": [[0] * 20, [1] * 20, [1] * 5 + [0] * 15],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", list(MASKS))
def test_padded_rows_equal_the_rows_alone(side: str, causal: bool) -> None:
    mask = torch.tensor(MASKS[side])
    q, k, v = draw(3, 4, 20, 16), draw(3, 2, 20, 16, seed=1), draw(3, 2, 20, 16, seed=2)
    upstream = torch.randn(3, 4, 20, 16, generator=torch.Generator().manual_seed(3))
    out = sparse_attention(q, k, v, CONFIG, causal=causal, attention_mask=mask)
    expected = torch.zeros_like(out, dtype=torch.float64)
    for row in range(3):
        real = mask[row].nonzero().flatten()
        if len(real):
            alone = window_by_loops(q[row][:, real], k[row][:, real], v[row][:, real], causal)
            expected = expected.index_put((torch.tensor(row), torch.arange(4)[:, None], real), alone)
    grads = torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream.double())
    assert not out[~mask.bool()[:, None].expand(-1, 4, -1)].any()
    for ours, oracle in zip((out, *grads), (expected, *wanted), strict=True):
        assert rms_ratio(ours, oracle) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_do_not_see_each_other(causal: bool) -> None:
    ids = torch.tensor([[0] * 7 + [1] * 12 + [2], [5] * 10 + [6] * 10])
    q, k, v = draw(2, 4, 20, 16), draw(2, 2, 20, 16, seed=1), draw(2, 2, 20, 16, seed=2)
    out = sparse_attention(q, k, v, CONFIG, causal=causal, sequence_ids=ids)
    for row, runs in enumerate(([(0, 7), (7, 19), (19, 20)], [(0, 10), (10, 20)])):
        for begin, end in runs:
            alone = window_by_loops(*(x[row, :, begin:end] for x in (q, k, v)), causal)
            assert rms_ratio(out[row, :, begin:end], alone) < 1e-5


def test_queries_are_the_last_positions() -> None:
    q, k, v = draw(2, 4, 20, 16), draw(2, 2, 20, 16, seed=1), draw(2, 2, 20, 16, seed=2)
    mask = torch.tensor([[0] * 4 + [1] * 16, [1] * 20])
    whole = sparse_attention(q, k, v, CONFIG, causal=True, attention_mask=mask)
    for queries in (1, 5, 18):
        last = sparse_attention(q[:, :, -queries:], k, v, CONFIG, causal=True, attention_mask=mask)
        assert rms_ratio(last, whole[:, :, -queries:]) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
def test_positions_of_queries_behind_a_cache(padded: bool) -> None:
    """Bias, spans and dropout of the last queries are those of their positions in the whole sequence."""
    n, queries = 20, 6
    q, k, v = (draw(2, 2, n, 16, seed=seed).detach() for seed in range(3))
    mask = torch.tensor([[0] * 4 + [1] * 16, [1] * n]) if padded else None
    options = ScoreOptions(
        scale=0.25, distance_bias=draw(2, 2 * n - 1).detach(), spans=torch.rand(2, 1, n) * n, ramp=5.3, dropout=0.4,
        seed=torch.tensor(77),
    )  # fmt: skip

    def run(rows: Tensor) -> Tensor:
        def plan_for(query_length: int, key_length: int) -> tuple[Part, ...]:
            band = Band(None, key_length - query_length)
            return (SegmentPart(query_length, key_length, query_length, key_length, band=band),)

        sequences = Sequences.from_mask(2, rows.shape[2], n, mask)
        return attend(rows, k, v, sequences, plan_for, options, choose_engine("native", rows, options))

    assert rms_ratio(run(q[:, :, -queries:]), run(q)[:, :, -queries:]) < 1e-5


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_dropout_drops_exactly_the_counted_pairs(engine: str) -> None:
    """V is the identity, so the outputs are the probabilities: the dropped ones are those of the hash, written out."""
    n, rate = 12, 0.4
    q, k = draw(1, 2, n, n), draw(1, 2, n, n, seed=1)
    identity = torch.eye(n).expand(1, 2, n, n).contiguous()
    torch.manual_seed(5)
    dropped = sparse_attention(q, k, identity, CONFIG, dropout=rate, engine=engine)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    whole = sparse_attention(q, k, identity, CONFIG)

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    def word(stream: int, head: int, position: int) -> int:
        result = mix((seed & 0xFFFFFFFF) ^ (0x632BE5AB if stream else 0))
        for value in (seed >> 32, 0, head, position):
            result = mix(result ^ value)
        return result

    whole, dropped = whole.detach(), dropped.detach()
    for h in range(2):
        for i in range(n):
            for j in range(n):
                row, column = word(0, h, i), word(1, h, j)
                product = (row ^ column) * (row | 1) & 0xFFFFFFFF
                signed = product - (product >> 31 << 32)
                kept = signed >= 2 * (round(rate * 2**31) - 2**30)
                expected = float(whole[0, h, i, j]) / (1 - rate) if kept else 0.0
                assert float(dropped[0, h, i, j]) == pytest.approx(expected, abs=1e-6)


def test_dropout_is_the_same_in_a_recomputation() -> None:
    q, k, v = draw(2, 2, 40, 16), draw(2, 2, 40, 16, seed=1), draw(2, 2, 40, 16, seed=2)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, CONFIG, causal=True, dropout=0.5)

    torch.manual_seed(0)
    plain = torch.autograd.grad(layer(q, k, v).sum(), (q, k, v))
    torch.manual_seed(0)
    recomputed = torch.autograd.grad(checkpoint(layer, q, k, v, use_reentrant=False).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_dropout_words_keep_each_number_apart() -> None:
    """Another seed (in either half), sequence, head or position gives other bits; the rate is met."""
    position = torch.arange(2000)
    zero = torch.tensor(0)
    base = {"seed": torch.tensor(2**33 + 1), "sequence": zero, "head": zero, "position": position}
    first = dropout_words(**base, stream=0)
    for change in (
        {"seed": torch.tensor(2**34 + 1)}, {"seed": torch.tensor(2**33 + 2)}, {"sequence": torch.tensor(1)},
        {"head": torch.tensor(1)}, {"position": position + 1},
    ):  # fmt: skip
        assert (dropout_words(**{**base, **change}, stream=0) == first).sum() < 3
    assert (dropout_words(**base, stream=1) == first).sum() < 3
    kept = dropout_keep(first[:, None], dropout_words(**base, stream=1)[None], 0.3)
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.002)
    # Rows and columns are equally thinned: no row word shows through.
    assert float(kept.float().mean(1).std()) == pytest.approx((0.3 * 0.7 / 2000) ** 0.5, rel=0.15)
    assert int(hash32(torch.tensor(1, dtype=torch.int32))) != 1


def test_bias_and_spans_of_padded_batches_get_their_gradients() -> None:
    """A batch with both paddings against its rows alone: the table's gradients add up, the spans' stay in place."""
    lengths, n = (14, 20, 9), 20
    table = draw(2, 2 * n - 1)
    spans = (torch.rand(3, 1, n, generator=torch.Generator().manual_seed(4)) * n).requires_grad_()
    q, k, v = draw(3, 2, n, 16), draw(3, 2, n, 16, seed=1), draw(3, 2, n, 16, seed=2)
    mask = torch.zeros(3, n, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, n - length :] = 1

    def plan_for(queries: int, keys: int) -> tuple[Part, ...]:
        return (window_part(keys, Band(None, 0)),)

    def run(rows: slice, mask: Tensor | None, length: int) -> Tensor:
        where = slice(n - length, n)
        options = ScoreOptions(scale=0.25, distance_bias=table, spans=spans[rows, :, where], ramp=5.3)
        tensors = [x[rows, :, where] for x in (q, k, v)]
        sequences = Sequences.from_mask(rows.stop - rows.start, length, length, mask)
        return attend(*tensors, sequences, plan_for, options, choose_engine("native", tensors[0], options))

    batch = run(slice(0, 3), mask, n)
    alone = [run(slice(row, row + 1), None, length) for row, length in enumerate(lengths)]
    inputs = (q, k, v, table, spans)
    found = torch.autograd.grad(batch.pow(2).sum(), inputs)
    wanted = torch.autograd.grad(sum(x.pow(2).sum() for x in alone), inputs)
    for a, b in zip(found, wanted, strict=True):
        assert rms_ratio(a, b) < 1e-5
        assert b.any()


@pytest.mark.parametrize("heads", [2, 4])
def test_put_is_the_adjoint_of_take(heads: int) -> None:
    x = draw(2, 2, 9, 3)
    for index in (None, slice(2, 7), shuffled(9, heads, 0, empty=3), shuffled(9, 1, 1, empty=2)):
        taken = take(x.detach(), index)
        for slot in range(taken.shape[2]):
            for b, h in ((0, 0), (1, taken.shape[1] - 1)):
                at = (
                    slot
                    if index is None
                    else index.start + slot
                    if isinstance(index, slice)
                    else int(index[0, h % index.shape[1], slot])
                )
                source = x[b, h * 2 // taken.shape[1], at] if at >= 0 else torch.zeros(3)
                assert torch.equal(taken[b, h, slot], source)
        slots = torch.randn(taken.shape, generator=torch.Generator().manual_seed(1))
        put_back = put(slots, index, x)
        assert float((taken * slots).sum()) == pytest.approx(float((x * put_back).sum()), rel=1e-4)


def test_merging_leaves_empty_rows_empty_and_takes_what_is_new() -> None:
    out, lse = torch.zeros(1, 1, 4, 2), torch.full((1, 1, 4), -torch.inf)
    index = torch.tensor([[[2, -1, 0]]])
    part = torch.tensor([[[[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]]]])
    merge_into(out, lse, part, torch.tensor([[[0.5, 7.0, -torch.inf]]]), index)
    assert out[0, 0].tolist() == [[0, 0], [0, 0], [1, 2], [0, 0]]
    assert lse[0, 0].tolist() == [-torch.inf, -torch.inf, 0.5, -torch.inf]
    merge_into(out, lse, torch.full((1, 1, 2, 2), 5.0), torch.tensor([[[-torch.inf, 0.5]]]), slice(1, 3))
    assert out[0, 0].tolist() == [[0, 0], [0, 0], [3, 3.5], [0, 0]]
    assert float(lse[0, 0, 2]) == pytest.approx(0.5 + torch.tensor(2.0).log().item())


def test_a_lone_part_is_handed_on_as_it_came() -> None:
    """A copy in fp32 and back would take as long as a sparse kernel."""

    class Kept(TileEngine):
        made: list[Tensor]

        def forward(self, *args: object) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # passed through
            result = super().forward(*args)  # type: ignore[arg-type]
            self.made = list(result)
            return result

        def backward(self, *args: object) -> Gradients:  # type: ignore[override]  # passed through
            result = super().backward(*args)  # type: ignore[arg-type]
            self.made = [result.query, result.key, result.value]
            return result

    engine, options = Kept(), ScoreOptions(scale=0.25)
    part = window_part(24, Band(6, 0))
    q, k, v = (draw(1, 2, 24, 16, seed=s).detach().bfloat16() for s in range(3))
    out, lse = plan_forward([part], q, k, v, options, engine)
    assert out is engine.made[0]
    grads = plan_backward([part], q, k, v, out, lse, q, options, engine)
    assert all(a is b for a, b in zip((grads.query, grads.key, grads.value), engine.made, strict=True))


def test_counters_made_in_evaluation_serve_training() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        made = counter_words((3, 1, 4, 1, 5), device)
    assert counter_words((3, 1, 4, 1, 5), device) is made
    assert not made.is_inference()
