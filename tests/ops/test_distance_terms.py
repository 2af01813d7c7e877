"""Terms of each query and each key with the distance: against the fp64 oracle, and that against plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_cases import compare, part_cases, rms_ratio, window_part
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sa_hf import SparseAttentionError, available_patterns
from sa_hf.layer import Geometry
from sa_hf.ops.attend import attend
from sa_hf.ops.choice import CPP, TILES, choose_engine
from sa_hf.ops.decode import decode_attention
from sa_hf.ops.engine import Engine
from sa_hf.ops.parts import Band, DistanceTerm, Part, ScoreOptions
from sa_hf.ops.reference import dense_attention, part_multiplicity
from sa_hf.ops.sequences import Sequences
from sa_hf.ops.triton.engine import _input_reason
from sa_hf.patterns.base import StaticPatternConfig, dense_multiplicity
from sa_hf.patterns.custom_op import layer_key, static_attention

N, HEADS = 70, 4
CANNOT = CPP.unsupported(torch.zeros(1, 1, 1, 16), ScoreOptions(1.0))
needs_kernels = pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))
ENGINES: list[Any] = [TILES, pytest.param(CPP, marks=needs_kernels)]
on_each_engine = pytest.mark.parametrize("engine", ENGINES, ids=["torch", "native"])


def term(rows: int, reach: int, *, heads: int = HEADS, batch: int = 2, seed: int = 0, double: bool = False) -> Any:
    """Buckets of distances up to ``reach``, in pairs beyond half of it; a distance and its opposite are apart."""
    generator = torch.Generator().manual_seed(seed)
    distance = torch.arange(-reach, reach + 1)
    near = distance.abs() <= reach // 2
    buckets = torch.where(near, distance, distance.sign() * (reach // 2 + (distance.abs() - reach // 2 + 1) // 2))
    buckets = (buckets - buckets.min()).flip(0) if seed else buckets - buckets.min()
    values = torch.randn(batch, heads, rows, int(buckets.max()) + 1, generator=generator)
    return DistanceTerm((values.double() if double else values).requires_grad_(), buckets)


def options(queries: int = N, keys: int = N, **values: Any) -> ScoreOptions:
    reach = values.pop("reach", 9)
    given = {"query_term": term(queries, reach), "key_term": term(keys, reach + 3, seed=1), **values}
    return ScoreOptions(scale=0.25, **given)


def test_the_oracle_is_the_definition() -> None:
    """Row by row, where distances are within the buckets' reach and where they are not."""
    made = replace(options(queries=7, keys=12, reach=4), extra_tokens=2)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, HEADS, n, 8, generator=generator) for n in (7, 12, 12))
    out, _ = dense_attention(q, k, v, torch.ones(12, dtype=torch.long), made)

    def added(side: DistanceTerm, b: int, h: int, row: int, distance: int) -> Tensor:
        centre = (len(side.buckets) - 1) // 2
        column = int(side.buckets[max(-centre, min(centre, distance)) + centre])
        return side.values[b, h, row, column]

    for b, h, new in ((0, 0, 0), (1, 3, 6), (1, 0, 3)):
        i = 5 + new
        scores = [q[b, h, new] @ k[b, h, j] * 0.25 for j in range(12)]
        for j in range(2, 12):
            scores[j] = scores[j] + added(made.query_term, b, h, new, j - i) + added(made.key_term, b, h, j, j - i)
        expected = torch.softmax(torch.stack(scores), 0) @ v[b, h]
        assert torch.allclose(out[b, h, new], expected, atol=1e-5)


@on_each_engine
@pytest.mark.parametrize("kind", list(part_cases(N, 2, HEADS)))
def test_parts_and_their_gradients(kind: str, engine: Engine) -> None:
    """Natural and reordered slots, empty ones among them; a group of heads for each key head."""
    plan = part_cases(N, 2, HEADS)[kind]
    sides: dict[str, dict[str, Any]] = {"both": {}, "query": {"key_term": None}, "key": {"query_term": None}}
    for side, values in sides.items():
        found = compare(
            plan, batch=2, heads=HEADS, kv_heads=2, query_length=N, key_length=N, options=options(**values),
            engine=engine,
        )  # fmt: skip
        assert found.worst() < 1e-5, (side, found.errors)
        assert ("query_term" in found.errors, "key_term" in found.errors) == (side != "key", side != "query")


@pytest.mark.parametrize("values", [
    {"softcap": 3.0},
    {"extra_tokens": 3},
    {"dropout": 0.4, "seed": torch.tensor(5)},
    {"distance_bias": torch.randn(HEADS, 2 * N - 1, generator=torch.Generator().manual_seed(1))},
    {"sinks": torch.randn(HEADS, generator=torch.Generator().manual_seed(1))},
    {"spans": torch.rand(2, 1, N, generator=torch.Generator().manual_seed(1)) * N, "ramp": 5.3},
], ids=lambda values: next(iter(values)))  # fmt: skip
@on_each_engine
def test_beside_every_other_option(values: dict[str, Any], engine: Engine) -> None:
    given = {
        name: x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in values.items()
    }
    for kind in ("union", "blocks reordered"):
        found = compare(
            part_cases(N, 2, HEADS)[kind], batch=2, heads=HEADS, kv_heads=HEADS, query_length=N, key_length=N,
            options=options(**given), engine=engine,
        )  # fmt: skip
        assert found.worst() < 1e-5, (kind, found.errors)


@on_each_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows(dtype: torch.dtype, engine: Engine) -> None:
    found = compare(
        [window_part(N, Band(20, 3))], batch=2, heads=HEADS, kv_heads=2, query_length=N, key_length=N,
        options=options(), dtype=dtype, engine=engine,
    )  # fmt: skip
    assert found.worst() < 5e-3, found.errors


@on_each_engine
def test_scores_of_hundreds_do_not_overflow_behind_the_end_of_a_sequence(engine: Engine) -> None:
    """Rows that fill up a tile, and empty slots, have no probabilities, whatever a key adds to its pairs."""
    made = options()
    made = replace(made, key_term=made.key_term.of_rows(lambda x: (300 * x.detach()).requires_grad_()))  # type: ignore[union-attr]
    for kind in ("blocks shared", "blocks reordered"):
        found = compare(
            part_cases(N, 2, HEADS)[kind], batch=2, heads=HEADS, kv_heads=2, query_length=N, key_length=N,
            options=made, engine=engine,
        )  # fmt: skip
        assert found.errors["output"] < 1e-4, kind


def test_gradcheck() -> None:
    made = ScoreOptions(
        scale=0.5, query_term=term(9, 3, heads=2, batch=1, double=True),
        key_term=term(9, 2, heads=2, batch=1, seed=1, double=True),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 9, 4, generator=generator).double().requires_grad_() for _ in range(3))

    def run(*tensors: Tensor) -> Tensor:
        now = made.with_learned([None, None, None, *tensors[3:]])
        return attend(*tensors[:3], Sequences.full(1, 9, 9), lambda n, m: (window_part(m, Band(4, 3)),), now, TILES)

    assert torch.autograd.gradcheck(run, (q, k, v, *made.learned[3:]))


MASKS = {
    "whole": [[1] * N, [1] * N],
    "left": [[0] * 20 + [1] * (N - 20), [1] * N],
    "right": [[1] * N, [1] * 13 + [0] * (N - 13)],
    "inside": [[1, 0] * (N // 2), [1] * 5 + [0] * 9 + [1] * (N - 14)],
}


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("side", list(MASKS))
@pytest.mark.parametrize("name", ["sliding_window", "bigbird", "longnet", "logsparse", "sparse_transformer"])
def test_patterns_over_padded_rows(name: str, side: str, operator: bool) -> None:
    """Each sequence alone, by the oracle under the pattern's own predicate; through autograd, and by the operator."""
    config = available_patterns()[name]()
    assert isinstance(config, StaticPatternConfig)
    mask, made = torch.tensor(MASKS[side]), options(queries=N, keys=N, dropout=0.0)
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, HEADS, N, 8, generator=generator).requires_grad_() for _ in range(3))
    upstream = torch.randn(2, HEADS, N, 8, generator=generator)
    leaves = (q, k, v, *made.learned[3:])
    expected = torch.zeros_like(upstream)
    heads = tuple(range(HEADS))
    for row in range(2):
        real = mask[row].nonzero().flatten()
        counts = dense_multiplicity(config, Geometry(len(real), len(real), heads, HEADS))
        of_row = [x[row : row + 1][:, :, real] for x in (q, k, v)]
        alone = made.with_learned([None, None, None, *(x[row : row + 1][:, :, real] for x in made.learned[3:])])  # type: ignore[index]
        expected[row : row + 1, :, real] = dense_attention(*of_row, counts, alone)[0]
    layer = layer_key(config, heads, HEADS, 0, False, Band(), "native")
    sequences = Sequences.from_mask(2, N, N, mask)
    if operator:  # a mode sees the registered operator
        with FlopCounterMode(display=False):
            out = static_attention(q, k, v, sequences, layer, made)
    else:
        out = static_attention(q, k, v, sequences, layer, made)
    found = torch.autograd.grad(out, leaves, upstream)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    assert out[~mask.bool()[:, None].expand(-1, HEADS, -1)].abs().sum() == 0
    for ours, oracle in zip((out, *found), (expected, *wanted), strict=True):
        assert rms_ratio(ours, oracle) < 1e-5
        assert oracle.any()


def test_memory_does_not_grow_with_the_square() -> None:
    """No tensor of the backward is as large as all pairs: 40 MB at this length."""
    n, largest = 3200, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            made = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
            largest = max([largest, *(x.numel() for x in made)])
            return out

    made = ScoreOptions(0.25, query_term=term(n, 9, heads=1, batch=1), key_term=term(n, 9, heads=1, batch=1, seed=1))
    q, k, v = (torch.randn(1, 1, n, 8).requires_grad_() for _ in range(3))
    plan = (window_part(n, Band(20, 3)),)
    out = attend(q, k, v, Sequences.full(1, n, n), lambda *_: plan, made, TILES)
    with Largest():
        out.sum().backward()
    assert made.query_term is not None
    assert made.query_term.values.grad is not None
    assert 0 < largest < n * n / 4


def test_engines_that_have_no_terms_say_so_and_the_next_one_runs() -> None:
    q = torch.zeros(2, HEADS, N, 16)
    assert choose_engine("auto", q.double(), options()) is TILES
    assert choose_engine("auto", q, options()) is (CPP if CANNOT is None else TILES)
    for engine in (CPP, TILES):
        assert "no terms" in str(engine.cannot_decode(q, q, q, options()))
    with pytest.raises(SparseAttentionError, match="no terms"):
        decode_attention(q, q, q, torch.zeros(1, 1, N, 1, dtype=torch.int64), options(), "torch")
    assert "no terms" in str(_input_reason(q, options()))
    assert _input_reason(q, ScoreOptions(0.25)) is None
    with pytest.raises(SparseAttentionError, match="engine 'triton' cannot serve"):
        choose_engine("triton", q, options())


def test_a_part_twice_is_a_key_twice() -> None:
    """The multiset union of parts, as without terms."""
    part: Part = window_part(N, Band(20, 3))
    made = options()
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, HEADS, N, 8, generator=generator) for _ in range(3))
    counts = 2 * part_multiplicity(part, N, N)
    twice = attend(q, k, v, Sequences.full(2, N, N), lambda *_: (part, part), made, TILES)
    assert rms_ratio(twice, dense_attention(q, k, v, counts, made)[0]) < 1e-5


@needs_kernels
def test_few_lanes_and_many_threads_in_c_plus_plus() -> None:
    """Pieces of one lane add to the values of the same keys; twice the same bits."""
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            for kind in ("union", "blocks reordered"):
                one, two = (
                    compare(
                        part_cases(N, 1, 1)[kind], batch=1, heads=1, kv_heads=1, query_length=N, key_length=N,
                        options=ScoreOptions(
                            0.25, query_term=term(N, 9, heads=1, batch=1),
                            key_term=term(N, 12, heads=1, batch=1, seed=1),
                        ), engine=CPP,
                    )
                    for _ in range(2)
                )  # fmt: skip
                assert one.worst() < 1e-5, (count, kind, one.errors)
                assert all(torch.equal(x, two.tensors[name]) for name, x in one.tensors.items())
    finally:
        torch.set_num_threads(threads)


def test_gradients_of_each_sample() -> None:
    """``vmap`` over ``grad``: buckets are one for all samples."""
    heads = tuple(range(HEADS))
    layer = layer_key(available_patterns()["sliding_window"](window=9), heads, HEADS, 0, False, Band(), "native")
    made, generator = term(N, 9, batch=3), torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(3, HEADS, N, 8, generator=generator) for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor, values: Tensor) -> Tensor:
        now = ScoreOptions(0.25, query_term=replace(made, values=values[None]))
        one = static_attention(q[None], k[None], v[None], Sequences.full(1, N, N), layer, now)
        return one.pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 3)))(q, k, v, made.values.detach())
    for sample in range(3):
        leaves = [x[sample].detach().requires_grad_() for x in (q, k, v, made.values)]
        wanted = torch.autograd.grad(loss(*leaves), (leaves[0], leaves[3]))
        for ours, expected in zip(found, wanted, strict=True):
            assert rms_ratio(ours[sample], expected) < 1e-5
            assert expected.any()
