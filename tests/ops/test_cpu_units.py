"""16-bit rows through the C++ kernels, by each of the units that multiply them here, against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ops_cases import Compared, compare, part_cases, rms_ratio, shuffled, window_part
from test_cpu_engines import option_cases
from test_cpu_kernels import PLAIN, all_of, draw, run, speckled
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.choice import CPP
from sa_hf.ops.cpp import kernels
from sa_hf.ops.parts import Band, OffsetsPart, ScoreOptions, SegmentPart
from sa_hf.ops.run import plan_backward, plan_forward

CANNOT = CPP.unsupported(torch.zeros(1, 1, 1, 16), PLAIN)
pytestmark = pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))

# Root-mean-square errors: three roundings to eight bits of the mantissa, or to eleven.
LIMITS = {torch.bfloat16: 8e-3, torch.float16: 2e-3}
LSE_LIMIT = 1e-4  # of fp32 sums, and an exponential to 3e-6
NAMES = list(part_cases(3, 2, 2))


@pytest.fixture(params=list(kernels.UNITS), autouse=True)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(kernels.UNITS_SWITCH, request.param)
    kernels.units.cache_clear()
    try:
        kernels.units()
    except SparseAttentionError as error:
        pytest.skip(str(error))
    yield request.param
    monkeypatch.undo()
    kernels.units.cache_clear()


@pytest.fixture(params=list(LIMITS), ids=str)
def dtype(request: pytest.FixtureRequest, unit: str) -> torch.dtype:
    if request.param == torch.float16 and unit != "none":
        pytest.skip("fp16 is widened by every unit")
    found: torch.dtype = request.param
    return found


def check(result: Compared, dtype: torch.dtype) -> None:
    assert max(result.errors.values()) < LIMITS[dtype], result.errors
    assert result.lse_error < LSE_LIMIT
    assert result.tensors["output"].dtype == dtype


@pytest.mark.parametrize("n", [7, 200])
@pytest.mark.parametrize("name", NAMES)
def test_every_part(name: str, n: int, dtype: torch.dtype) -> None:
    plan = part_cases(n, 2, 4)[name]
    result = compare(plan, batch=2, heads=4, query_length=n, key_length=n, head_dim=32, dtype=dtype)
    check(result, dtype)


@pytest.mark.parametrize("option", list(option_cases(1, 2, 3)))
def test_every_option(option: str, dtype: torch.dtype) -> None:
    n = 150
    plan = [
        speckled(n, 2, 32, Band(None, 0)),
        OffsetsPart(n, ((0, 3, 24),)),
        part_cases(n, 2, 2)["segments reordered"][0],
    ]
    options = option_cases(2, 2, n)[option]
    check(compare(plan, batch=2, query_length=n, key_length=n, dtype=dtype, options=options), dtype)
    check(compare(plan[:1], batch=2, query_length=n, key_length=n, dtype=dtype, options=options), dtype)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_the_order_of_the_scores(scale: float, dtype: torch.dtype) -> None:
    options = replace(PLAIN, scale=scale)
    check(
        compare([window_part(100, Band(40, 9))], query_length=100, key_length=100, dtype=dtype, options=options), dtype
    )


@pytest.mark.parametrize("head_dim", [1, 8, 24, 40, 64, 72, 96, 200])
def test_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    n = 100
    rows, columns = shuffled(n, 2, 1, empty=3), shuffled(n, 2, 2, empty=3)
    listed = SegmentPart(n, n, 70, 70, band=Band(None, 0), query_index=rows, key_index=columns)
    offsets = OffsetsPart(n, ((0, 1, 2, 70), (5, -3)), 2, query_index=columns, key_index=rows)
    for plan in ([speckled(n, 2, 64, Band(None, 0))], [listed, window_part(n, Band(9, 9)), offsets]):
        check(compare(plan, query_length=n, key_length=n, head_dim=head_dim, dtype=dtype), dtype)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (3, 3)])
def test_any_number_of_threads(heads: int, kv_heads: int, threads: int, dtype: torch.dtype) -> None:
    """Where key lanes are pieces or not, of one part or of several; twice the same, to the bit."""
    n = 200
    parts = [speckled(n, heads, 64, Band(None, 0)), OffsetsPart(n, (tuple(range(-20, 20)),), 3, 190)]
    for plan in (parts, parts[:1]):
        first, second = (
            compare(plan, heads=heads, kv_heads=kv_heads, query_length=n, key_length=n, dtype=dtype) for _ in range(2)
        )
        check(first, dtype)
        assert all(torch.equal(first.tensors[x], second.tensors[x]) for x in first.tensors)


def test_views_are_read_where_they_lie(dtype: torch.dtype) -> None:
    n = 100
    plain = [draw(2, 2, n, 32, seed=s).to(dtype) for s in range(3)]
    behind = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    apart = [torch.stack([x, torch.full_like(x, torch.nan)], 3).flatten(2, 3)[:, :, ::2] for x in plain]
    plan = part_cases(n, 2, 2)["union"]
    expected = all_of(run(plan, *plain, PLAIN))
    for views in (behind, apart):
        assert all(torch.equal(a, b) for a, b in zip(expected, all_of(run(plan, *views, PLAIN)), strict=True))


@pytest.mark.parametrize("bits", [0x7FFF, -1, 0x7F80], ids=["nan", "-nan", "inf"])
def test_what_is_not_a_number_comes_out_where_it_is_read_and_nowhere_else(bits: int) -> None:
    n = 200
    q, k, v = (draw(1, 1, n, 32, seed=s).bfloat16() for s in range(3))
    q.view(torch.int16)[0, 0, 70, 3] = bits
    out, _, grads = run([SegmentPart(n, n, n, n, band=Band(None, 0))], q, k, v, PLAIN)
    for x in (out, grads.query):
        assert (~x.isfinite().all(-1)[0, 0]).nonzero().flatten().tolist() == [70]


def test_peaks_that_rise_and_scores_of_any_size(dtype: torch.dtype) -> None:
    n = 300
    q, k, v = (draw(1, 2, n, 32, seed=s).to(dtype) for s in range(3))
    steep = k * (1 + torch.arange(n)[:, None] / 3).to(dtype)
    out, lse, _ = run([SegmentPart(n, n, n, n)], q, steep, v, PLAIN)
    scores = 0.3 * q.double() @ steep.double().transpose(2, 3)
    assert scores.abs().amax() > 300
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5)
    assert torch.allclose(out.double(), scores.softmax(-1) @ v.double(), atol=0.05)


@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_those_of_dense_attention_in_the_same_dtype(causal: bool, dtype: torch.dtype) -> None:
    """At most twice its error against fp64, three times in gradients."""
    n, d = 400, 64
    part = SegmentPart(n, n, n, n, band=Band(None, 0) if causal else Band())
    drawn = [draw(1, 2, n, d, seed=s).to(dtype) for s in range(4)]

    def both(inputs: list[Tensor]) -> list[Tensor]:
        q, k, v, upstream = (x.detach().requires_grad_() for x in inputs)
        out = scaled_dot_product_attention(q, k, v, is_causal=causal)
        return [out, *torch.autograd.grad(out, (q, k, v), upstream)]

    exact, dense = both([x.double() for x in drawn]), both(drawn)
    q, k, v, upstream = drawn
    options = ScoreOptions(scale=d**-0.5)
    out, lse = plan_forward([part], q, k, v, options, CPP)
    grads = plan_backward([part], q, k, v, out, lse, upstream, options, CPP)
    for times, ours, known, oracle in zip(
        (2, 3, 3, 3), (out, grads.query, grads.key, grads.value), dense, exact, strict=True
    ):
        assert rms_ratio(ours, oracle) < times * rms_ratio(known, oracle)


def test_a_unit_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.UNITS_SWITCH, "tensor_cores")
    kernels.units.cache_clear()
    with pytest.raises(SparseAttentionError, match=r"'tensor_cores' must be one of .*; nearest: "):
        kernels.units()
