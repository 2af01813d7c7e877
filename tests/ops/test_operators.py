"""Eager calls do without the registered operator; whatever has to see one, does; and both give the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sa_hf import SparseAttentionError, sparse_attention
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.planned import planned_attention
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns import BigBirdAttentionConfig
from sa_hf.patterns.expire_span import EXPIRING

CONFIG = BigBirdAttentionConfig(block_size=16)


class Seen(TorchDispatchMode):
    """The names of our operators that a mode gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sa_hf":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def tensors(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 80, 16, generator=generator, requires_grad=True) for _ in range(count)]


def check_the_operator_is_the_same(run: Callable[[], tuple[Tensor, ...]], name: str) -> None:
    """A mode sees the operator and its backward, and changes no bit."""
    plain = run()
    with Seen() as seen:
        through = run()
    assert seen.names == [name, f"{name}_backward"]
    for ours, theirs in zip(plain, through, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_with_and_without_the_operator(masked: bool) -> None:
    *qkv, grad = tensors(4)
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[0, :30], mask[1, 40:45] = 0, 0
    call = {"attention_mask": mask} if masked else {}

    def run() -> tuple[Tensor, ...]:
        out = sparse_attention(*qkv, CONFIG, **call)
        return out, *torch.autograd.grad(out, qkv, grad.detach())

    check_the_operator_is_the_same(run, "sa_hf::static_attention")


def test_no_operator_is_called_in_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_hf.patterns import custom_op

    monkeypatch.setattr(custom_op, "_static_attention", None)
    assert sparse_attention(*tensors(), CONFIG).shape == (2, 2, 80, 16)


def test_a_plan_by_rule_with_and_without_the_operator() -> None:
    *qkv, grad = tensors(4)
    spans = torch.full((2, 1, 80), 9.0, requires_grad=True)
    leaves = [*qkv, spans]

    def run() -> tuple[Tensor, ...]:
        options = ScoreOptions(0.25, spans=spans, ramp=4.0)
        out = planned_attention(*qkv, EXPIRING, options, "native", numbers=[13])
        return out, *torch.autograd.grad(out, leaves, grad.detach())

    check_the_operator_is_the_same(run, "sa_hf::planned_attention")


def test_tensors_without_data_get_a_result_without_data() -> None:
    q, k, v = (torch.empty(1, 2, 80, 16, device="meta") for _ in range(3))
    assert sparse_attention(q, k, v, CONFIG).is_meta
    with FakeTensorMode():
        fake = sparse_attention(*(torch.empty(1, 2, 80, 16) for _ in range(3)), CONFIG)
    assert type(fake).__name__ == "FakeTensor"


def test_a_second_derivative_is_refused() -> None:
    q, k, v = tensors()
    (first,) = torch.autograd.grad(sparse_attention(q, k, v, CONFIG).square().sum(), q, create_graph=True)
    with pytest.raises(SparseAttentionError, match="twice"):
        first.sum().backward()


def test_autocast_changes_nothing_inside() -> None:
    *qkv, grad = tensors(4)

    def run() -> tuple[Tensor, ...]:
        out = sparse_attention(*qkv, CONFIG, engine="native")
        return out, *torch.autograd.grad(out, qkv, grad.detach())

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run()
    for ours, theirs in zip(under, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_sequences_of_full_rows_are_numbered_only_for_dropout() -> None:
    from sa_hf.ops.attend import Batch

    rows, device = Sequences.full(3, 8, 8), torch.device("cpu")
    assert Batch(rows, lambda *_: (), ScoreOptions(1.0), device).whole_options.sequence_ids is None
    ids = Batch(rows, lambda *_: (), ScoreOptions(1.0, dropout=0.5, seed=torch.tensor(1)), device).whole_options
    assert ids.sequence_ids is not None
    assert ids.sequence_ids.tolist() == [0, 1, 2]
