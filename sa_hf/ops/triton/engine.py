"""The Triton engine: one part, forward and backward, on a GPU (or under Triton's interpreter on the CPU)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sa_hf.ops.engine import Engine, Gradients, Merging, Total
from sa_hf.ops.graphs import hold
from sa_hf.ops.parts import BlockPart, OffsetsPart, Part, ScoreOptions, SegmentPart
from sa_hf.ops.pieces import Piece
from sa_hf.ops.triton.device import capability, interpreting, on_device, why_not
from sa_hf.ops.triton.lists import TileLists, layout_lists, segment_lists
from sa_hf.ops.widths import at_one_width

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_HEAD_DIM, LARGEST_HEAD_DIM = 16, 256
LARGEST_GRID = 65535  # of CUDA, second and third axis


class TritonEngine(Engine):
    """Contract of the launchers: see ``launch_block.py`` and ``launch_offsets.py``.

    Importing this module needs neither triton nor a GPU; kernels are made at the first call. With
    ``TRITON_INTERPRET=1`` set before that, they run on CPU tensors.
    """

    name = "triton"

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        return _machine_reason(query.device) or _input_reason(query, options)

    def forward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor]:
        from sa_hf.ops.triton.launch_block import block_forward
        from sa_hf.ops.triton.launch_offsets import offsets_forward
        from sa_hf.ops.triton.scores import Scores

        scores = Scores.of(options, part.query_index, part.key_index, query, key)
        with on_device(query.device):
            if isinstance(part, OffsetsPart):
                return offsets_forward(part, query, key, value, scores)
            return block_forward(_held_lists(part, query), query, key, value, scores)

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        options: ScoreOptions,
    ) -> Gradients:  # fmt: skip
        from sa_hf.ops.triton.launch_block import block_backward
        from sa_hf.ops.triton.launch_offsets import offsets_backward
        from sa_hf.ops.triton.scores import Scores

        scores = Scores.of(options, part.query_index, part.key_index, query, key)
        with on_device(query.device):
            if isinstance(part, OffsetsPart):
                return offsets_backward(part, query, key, value, out, lse, grad_out, scores)
            return block_backward(_held_lists(part, query), query, key, value, out, lse, grad_out, scores)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
        from sa_hf.ops.triton.launch_decode import decode

        return at_one_width(lambda q, k, v: decode(q, k, v, index, options), query, key, value)

    def pieces(self, part: Part, query: Tensor, key: Tensor) -> Iterator[Piece]:
        yield Piece.of_all(part)

    def gather(self, piece: Piece, query: Tensor, key: Tensor, value: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        from sa_hf.ops.triton.launch_rows import gather

        return gather(piece.part, query, key, value, *rows)

    def merging(self, query: Tensor, start: tuple[Tensor, Tensor] | None) -> Merging:
        from sa_hf.ops.triton.sums import KernelMerging

        return KernelMerging(self, query, start)

    def total(self, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Total:
        from sa_hf.ops.triton.sums import KernelTotal

        return KernelTotal(self, query, key, value, options)


def _held_lists(part: BlockPart | SegmentPart, query: Tensor) -> TileLists:
    lists = segment_lists(part, query.device) if isinstance(part, SegmentPart) else layout_lists(part.layout)
    hold(query, part, lists)
    return lists


def _machine_reason(device: torch.device) -> str | None:
    missing = why_not()
    if missing is not None:
        return missing
    if interpreting():
        return (
            None if device.type == "cpu" else "in this process triton only interprets, on the CPU (TRITON_INTERPRET=1)"
        )
    if device.type != "cuda":
        return f"its kernels run on a GPU, not on {device.type}"
    if torch.version.hip is None and capability(device.index) < 80:
        major, minor = divmod(capability(device.index), 10)
        return f"its kernels need compute capability 8.0 or newer, and this GPU has {major}.{minor}"
    return None


def _input_reason(query: Tensor, options: ScoreOptions) -> str | None:
    head_dim = query.shape[-1]
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is none of float16, bfloat16, float32"
    if head_dim % 8 or not SMALLEST_HEAD_DIM <= head_dim <= LARGEST_HEAD_DIM:
        return f"head_dim={head_dim} is no multiple of 8 in {SMALLEST_HEAD_DIM} .. {LARGEST_HEAD_DIM}"
    if query.shape[0] > LARGEST_GRID:
        return f"batch={query.shape[0]} is above the {LARGEST_GRID} of a launch grid's third axis"
    if options.scale <= 0:
        return f"scale={options.scale} must be positive"
    if options.ramp <= 0:
        return f"ramp={options.ramp} must be positive"
    if options.terms != (None, None):
        return "its kernels have no terms of each query or key with the distance"
    return None
