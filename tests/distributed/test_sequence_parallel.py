"""Sequence parallel LongNet in gloo processes, against a plain-loop multiset oracle and the single-process operator."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sa_hf import LongNetAttentionConfig, SparseAttentionError, sparse_attention
from sa_hf.distributed import sequence_parallel_longnet
from sa_hf.distributed.sequence_parallel import _branches

pytestmark = pytest.mark.filterwarnings("ignore:longnet")


@dataclass(frozen=True)
class Case:
    segments: tuple[int, ...]
    ratios: tuple[int, ...]
    length: int = 8  # tokens per rank
    heads: int = 4
    key_heads: int = 2
    head_offset: str = "modulo"
    dropout: float = 0.0

    @property
    def config(self) -> LongNetAttentionConfig:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LongNetAttentionConfig(
                segment_length=self.segments, dilated_ratio=self.ratios, head_offset=self.head_offset
            )

    def inputs(self, ranks: int) -> list[Tensor]:
        """query, key, value and the output's gradient, of the whole sequence."""
        generator = torch.Generator().manual_seed(7)
        n = ranks * self.length
        return [
            torch.randn(2, heads, n, 4, generator=generator, dtype=torch.float64)
            for heads in (self.heads, self.key_heads, self.key_heads, self.heads)
        ]


CASES = {
    "heads of a group in different phases": Case((4, 16, 32), (1, 2, 4)),
    "dilations that do not divide the rank": Case((4, 8, 16, 32), (1, 3, 5, 7), heads=3, key_heads=3),
    "grouped offsets, one phase per key head": Case((8, 32), (1, 2), heads=8, head_offset="grouped"),
    "no branch of ratio 1": Case((8, 32), (2, 3)),
    "a segment longer than the sequence": Case((8, 512), (1, 3)),
    "a last segment of fewer ranks": Case((8, 24), (1, 2)),
    "ranks without a kept position": Case((8, 32), (1, 11), heads=2),
    "nothing passes between the ranks": Case((4, 8), (1, 2)),
    "one token per rank": Case((1, 2, 4), (1, 2, 3), length=1),
    "dropout": Case((4, 16, 32), (1, 2, 4), dropout=0.3),
}


def oracle(case: Case, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """One softmax over the list of a row's keys, branch after branch."""
    batch, heads, n, d = query.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // case.key_heads)
            for i in range(n):
                keys = []
                for w, r in zip(case.segments, case.ratios, strict=True):
                    w = min(w, n)
                    s = h % r if case.head_offset == "modulo" else h // math.ceil(heads / r)
                    if i % w % r == s:
                        keys += [j for j in range(n) if i // w == j // w and j % w % r == s and (j <= i or not causal)]
                if keys:
                    weights = (key[b, g, keys] @ query[b, h, i] / math.sqrt(d)).softmax(0)
                    rows.append(weights @ value[b, g, keys])
                else:
                    rows.append(torch.zeros(d, dtype=query.dtype))
    return torch.stack(rows).view(query.shape)


def with_gradients(attend, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = attend(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def worker(process: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=processes)
    pairs = [dist.new_group([start, start + 1]) for start in range(0, processes, 2)]
    # The whole world, and pairs that each hold the sequence: sequence parallel beside data parallel.
    found = {processes: run_cases(None, process, processes), 2: run_cases(pairs[process // 2], process % 2, 2)}
    torch.save(found, f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_cases(group: dist.ProcessGroup | None, rank: int, ranks: int) -> dict:
    results: dict = {}
    for name, case in CASES.items():
        own = [x.chunk(ranks, dim=2)[rank] for x in case.inputs(ranks)]
        for causal in (False, True):

            def attend(*qkv: Tensor, case: Case = case, causal: bool = causal) -> Tensor:
                torch.manual_seed(3 + rank)
                return sequence_parallel_longnet(*qkv, case.config, group, causal=causal, dropout=case.dropout)

            results[name, causal] = with_gradients(attend, *own)
            if case.dropout and causal:
                again = with_gradients(lambda *qkv, call=attend: checkpoint(call, *qkv, use_reentrant=False), *own)
                results["checkpointed", True] = again
    results["errors"] = errors(rank, group, [x.chunk(ranks, dim=2)[rank] for x in Case((8,), (1,)).inputs(ranks)])
    return results


def errors(rank: int, group: dist.ProcessGroup | None, own: list[Tensor]) -> list[str]:
    query, key, value, _ = own
    few = query.shape[2] - rank % 2  # unequal numbers of tokens
    calls = {
        "divide": ((query, key, value), LongNetAttentionConfig(segment_length=(3,), dilated_ratio=(1,))),
        "unequal": ((query[:, :, :few], key[:, :, :few], value[:, :, :few]), CASES["no branch of ratio 1"].config),
        "diagonal": ((query, key, value), LongNetAttentionConfig(drop_diagonal=True)),
        "tokens": ((query, key[:, :, 1:], value[:, :, 1:]), LongNetAttentionConfig()),
    }
    messages = []
    for qkv, config in calls.values():
        with pytest.raises(SparseAttentionError) as error:
            sequence_parallel_longnet(*qkv, config, group)
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of four processes found, by the number of ranks of a sequence."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(4, str(folder)), nprocs=4)
    return [torch.load(Path(folder) / f"{p}.pt", weights_only=True) for p in range(4)]


def joined(found: list[dict], key: tuple[str, bool]) -> list[Tensor]:
    return [torch.cat(pieces, dim=2) for pieces in zip(*(f[key] for f in found), strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_one_process(processes: list[dict], ranks: int, causal: bool) -> None:
    found = [p[ranks] for p in processes]
    for name, case in CASES.items():
        inputs = case.inputs(ranks)

        def single(*qkv: Tensor, case: Case = case) -> Tensor:
            torch.manual_seed(3)  # the generator of the first rank
            return sparse_attention(*qkv, case.config, causal=causal, dropout=case.dropout)

        references = [with_gradients(single, *inputs)]
        if not case.dropout:
            references.append(with_gradients(lambda *qkv, c=case: oracle(c, *qkv, causal), *inputs))
        for start in range(0, len(found), ranks):
            got = joined(found[start : start + ranks], (name, causal))
            for expected in references:
                for what, a, b in zip(("out", "query", "key", "value"), got, expected, strict=True):
                    error = (a - b).norm() / b.norm().clamp(min=1)
                    assert error < 1e-10, (name, what, float(error))


def test_recomputation_repeats_the_exchange_and_the_dropout(processes: list[dict]) -> None:
    found = [p[4] for p in processes]
    once, again = joined(found, ("dropout", True)), joined(found, ("checkpointed", True))
    for expected, got in zip(once, again, strict=True):
        assert torch.equal(got, expected)


def test_bad_input_is_refused_on_every_rank(processes: list[dict]) -> None:
    for found in processes:
        divide, unequal, diagonal, tokens = found[4]["errors"]
        assert "one must divide the other" in divide
        assert "8 tokens per rank" in divide
        assert "9 tokens" in divide
        assert "between 7 and 8 tokens" in unequal
        assert "drop_diagonal" in diagonal
        assert "same tokens" in tokens


@pytest.mark.parametrize(("ranks", "w", "r"), [(4, 32, 4), (64, 32, 4), (64, 512, 3)])
def test_the_exchange_does_not_grow_with_the_sequence(ranks: int, w: int, r: int) -> None:
    """A rank shares ceil(l / r) slots, padding included, with the w / l ranks of its segment."""
    config = LongNetAttentionConfig(segment_length=(8, w), dilated_ratio=(1, r))
    for rank in range(ranks):
        local, spanning = _branches(config, rank, ranks, 8, 4, 4, True, torch.device("cpu"))
        assert local.sent is None
        assert spanning.sent.shape == (1, 4, -(-8 // r))
        assert rank in spanning.ranks
        assert len(spanning.ranks) == w // 8


def test_needs_a_process_group() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(SparseAttentionError, match="init_process_group"):
        sequence_parallel_longnet(x, x, x, LongNetAttentionConfig())
