"""What is run: patterns at a quarter of dense attention's pairs or less, ways to train, and settings of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from sa_hf.config import SparseAttentionConfig, did_you_mean
from sa_hf.errors import SparseAttentionError
from sa_hf.patterns import (
    BigBirdAttentionConfig,
    BlockTopKAttentionConfig,
    DenseAttentionConfig,
    ExpireSpanAttentionConfig,
    LogSparseAttentionConfig,
    LongNetAttentionConfig,
    RoutingAttentionConfig,
    SlidingWindowAttentionConfig,
    SparseBertAttentionConfig,
    SparseTransformerAttentionConfig,
    StarAttentionConfig,
)

Part = Literal["decoder", "encoder"]
PARTS: tuple[Part, ...] = ("decoder", "encoder")
Assigned: TypeAlias = SparseAttentionConfig | Mapping[str, Any]  # what patch_model takes

DENSE = "dense"
MAX_DENSITY = 0.25  # of the dense pairs, mean over layers and heads, at the length that is reported
STEPS = (0, 30, 100, 300)
SEEDS = (0, 1, 2)
ENOUGH = 0.98  # of dense attention's figure
# The eight published systems; the other rows are mixtures, plain windows and blocks chosen by content.
SYSTEMS = ("longnet", "logsparse", "sparse_transformer", "sparsebert", "expire_span", "routing", "bigbird", "star")

ONE_LAYER_DENSE = "one layer dense"  # how the name of such a row ends
_DENSE = DenseAttentionConfig()
_DENSE_LAYER = 2  # of six, chosen on the tuning split: it copies from a line that comes again


def _one_layer_dense(config: SparseAttentionConfig) -> Assigned:
    """One layer dense, ``config`` in all others: a sixth of the pairs are spent there."""
    return {f"0-{_DENSE_LAYER - 1}": config, str(_DENSE_LAYER): _DENSE, f"{_DENSE_LAYER + 1}-": config}


# At 1,024 positions, 8 query heads on 4 key heads, 6 layers.
DECODER: dict[str, Assigned] = {
    DENSE: _DENSE,
    "sliding_window": SlidingWindowAttentionConfig(window=112, num_sink_tokens=4),
    "sliding_window, one layer dense": _one_layer_dense(SlidingWindowAttentionConfig(window=32, num_sink_tokens=4)),
    "sliding_window, one head dense": {
        "heads": {"0": _DENSE, "1-": SlidingWindowAttentionConfig(window=64, num_sink_tokens=4)}
    },
    "longnet": LongNetAttentionConfig(segment_length=(64, 256, 1024), dilated_ratio=(1, 2, 4)),
    "logsparse": LogSparseAttentionConfig(local_window=64),
    "logsparse, convolution": LogSparseAttentionConfig(local_window=64, conv_kernel_size=3),
    "sparse_transformer, fixed": SparseTransformerAttentionConfig(kind="fixed", stride=64, summary=8),
    "sparse_transformer, strided": SparseTransformerAttentionConfig(kind="strided", stride=64),
    "sparsebert": SparseBertAttentionConfig(mask_length=128),
    "expire_span": ExpireSpanAttentionConfig(max_span=1024, ramp=32, initial_span=96.0, span_loss_coef=1e-4),
    "routing": RoutingAttentionConfig(num_clusters=8, window=128, num_local_heads=4, local_window=112),
    "bigbird": BigBirdAttentionConfig(block_size=32, num_random_blocks=1, global_blocks="first", num_global_blocks=1),
    "star": StarAttentionConfig(ring=False),
    "block_topk": BlockTopKAttentionConfig(block_size=16, top_k=4, selection="query"),
    "block_topk, indexer": BlockTopKAttentionConfig(block_size=16, top_k=4, selection="query", indexer=True),
    # Content is found over any distance by the one dense layer; the others are narrower for it.
    "longnet, one layer dense": _one_layer_dense(
        LongNetAttentionConfig(segment_length=(64, 256, 1024), dilated_ratio=(1, 4, 16))
    ),
    "logsparse, one layer dense": _one_layer_dense(LogSparseAttentionConfig(local_window=40)),
    "sparse_transformer, fixed, one layer dense": _one_layer_dense(
        SparseTransformerAttentionConfig(kind="fixed", stride=32, summary=2)
    ),
    "sparse_transformer, strided, one layer dense": _one_layer_dense(
        SparseTransformerAttentionConfig(kind="strided", stride=32)
    ),
    "sparsebert, one layer dense": _one_layer_dense(SparseBertAttentionConfig(mask_length=48)),
    "expire_span, one layer dense": _one_layer_dense(
        ExpireSpanAttentionConfig(max_span=1024, ramp=16, initial_span=28.0, span_loss_coef=1e-4)
    ),
    "routing, one layer dense": _one_layer_dense(
        RoutingAttentionConfig(num_clusters=16, window=64, num_local_heads=4, local_window=48)
    ),
    "bigbird, one layer dense": _one_layer_dense(
        BigBirdAttentionConfig(
            block_size=8, num_window_blocks=5, num_random_blocks=2, global_blocks="first", num_global_blocks=1
        )
    ),
    "star, one layer dense": _one_layer_dense(StarAttentionConfig(ring=False)),
}  # fmt: skip

# Rows whose learned masks are searched for so many steps, which run dense, and then fixed: the other steps run sparse.
FROZEN_AFTER = {"sparsebert, one layer dense": 30}

# At 768 positions, 12 heads, 6 layers. Expire-Span is causal only.
ENCODER: dict[str, Assigned] = {
    DENSE: _DENSE,
    "sliding_window": SlidingWindowAttentionConfig(window=80, num_sink_tokens=4),
    "sliding_window, one layer dense": _one_layer_dense(SlidingWindowAttentionConfig(window=24, num_sink_tokens=4)),
    "sliding_window, two heads dense": {
        "heads": {"0-1": _DENSE, "2-": SlidingWindowAttentionConfig(window=24, num_sink_tokens=4)}
    },
    "longnet": LongNetAttentionConfig(segment_length=(64, 256, 1024), dilated_ratio=(1, 2, 4)),
    "logsparse": LogSparseAttentionConfig(local_window=64),
    "sparse_transformer, fixed": SparseTransformerAttentionConfig(kind="fixed", stride=64, summary=8),
    "sparse_transformer, strided": SparseTransformerAttentionConfig(kind="strided", stride=64),
    "sparsebert": SparseBertAttentionConfig(mask_length=96),
    "routing": RoutingAttentionConfig(num_clusters=8, num_local_heads=6, local_window=80),
    "bigbird": BigBirdAttentionConfig(block_size=16, num_window_blocks=5, num_random_blocks=2),
    "star": StarAttentionConfig(),
    "block_topk": BlockTopKAttentionConfig(block_size=16, top_k=6, num_window_blocks=3),
    "block_topk, indexer": BlockTopKAttentionConfig(block_size=16, top_k=6, num_window_blocks=3, indexer=True),
}  # fmt: skip
NOT_SERVED: dict[Part, dict[str, str]] = {"decoder": {}, "encoder": {"expire_span": "causal only"}}
PATTERNS: dict[Part, dict[str, Assigned]] = {"decoder": DECODER, "encoder": ENCODER}


@dataclass(frozen=True)
class Method:
    """A way to train: all weights or adapters of PEFT, with or without the dense teacher.

    ``rate`` is the learning rate, ``weight`` of the distance to the teacher. Both are set by hand so far: nothing has
    been tried on the tuning split (``--split tuning``) yet.
    """

    lora: bool
    distill: str | None
    rate: float
    weight: float = 1.0

    def settings(self) -> dict[str, Any]:
        return asdict(self)


METHODS: dict[Part, dict[str, Method]] = {
    "decoder": {
        "plain": Method(False, None, 3e-4),
        "distill": Method(False, "logits", 3e-4),
        "lora": Method(True, None, 2e-3),
        "lora distill": Method(True, "logits", 2e-3),
    },
    "encoder": {
        "plain": Method(False, None, 5e-5),
        "distill": Method(False, "outputs", 5e-5),
        "lora": Method(True, None, 5e-4),
        "lora distill": Method(True, "outputs", 5e-4),
    },
}
UNTRAINED = "none"  # the method of step 0, which is the same for all and every seed


@dataclass(frozen=True)
class Cell:
    """One figure of the grid."""

    part: str
    pattern: str
    method: str
    seed: int
    step: int
    split: str = "report"


@dataclass(frozen=True)
class Chain:
    """The cells of one training, in the order of their steps."""

    pattern: str
    method: str
    seed: int
    cells: tuple[Cell, ...]


def chains(
    part: Part, patterns: Sequence[str], methods: Sequence[str], seeds: Sequence[int], steps: Sequence[int], split: str
) -> list[Chain]:
    """What to train: the untrained models first, then one seed after the other, so that a run that is stopped has
    whole curves of the first."""
    found = []
    if 0 in steps:
        for pattern in patterns:
            found.append(Chain(pattern, UNTRAINED, 0, (Cell(part, pattern, UNTRAINED, 0, 0, split),)))
    later = sorted(step for step in set(steps) if step > 0)
    for seed in seeds if later else ():
        for method in methods:
            for pattern in patterns:
                if pattern == DENSE and METHODS[part][method].distill is not None:
                    continue  # its own teacher
                cells = tuple(Cell(part, pattern, method, seed, step, split) for step in later)
                found.append(Chain(pattern, method, seed, cells))
    return found


def chosen(given: Iterable[str] | None, known: Iterable[str], option: str) -> list[str]:
    """The names that were asked for, in the order of those known; None is all.

    Raises:
        SparseAttentionError: a name that is not known.
    """
    names = list(known)
    wanted = names if given is None else list(given)
    for name in wanted:
        if name not in names:
            raise SparseAttentionError(f"{option} {name!r}{did_you_mean(name, names)} is none of {names}")
    return [name for name in names if name in wanted]


def system_of(pattern: str) -> str:
    """The name of the registered pattern that a row is of."""
    return pattern.partition(",")[0]


def described(assigned: Assigned) -> Any:
    """An assignment as JSON takes it."""
    if isinstance(assigned, SparseAttentionConfig):
        return {key: value for key, value in assigned.to_dict().items() if key != "version"}
    return {place: described(inner) for place, inner in assigned.items()}
