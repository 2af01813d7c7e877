"""The Triton engine: one part, forward and backward, on a GPU (or under Triton's interpreter on the CPU)."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from sa_hf.ops.engine import Gradients
from sa_hf.ops.graphs import hold
from sa_hf.ops.parts import BlockPart, OffsetsPart, Part, ScoreOptions, SegmentPart
from sa_hf.ops.triton.lists import TileLists, layout_lists, segment_lists

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_HEAD_DIM, LARGEST_HEAD_DIM = 16, 256
LARGEST_GRID = 65535  # of CUDA, second and third axis


class TritonEngine:
    """Contract of the launchers: see ``launch_block.py`` and ``launch_offsets.py``.

    Importing this module needs neither triton nor a GPU; kernels are made at the first call. With
    ``TRITON_INTERPRET=1`` set before that, they run on CPU tensors.
    """

    name = "triton"
    own_rows = True

    def in_place(self, query: Tensor) -> bool:
        return False

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        return _machine_reason(query.device) or _input_reason(query, options)

    def forward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor]:
        from sa_hf.ops.triton import launch_block, launch_offsets
        from sa_hf.ops.triton.scores import Scores

        scores = Scores.of(options, part.query_index, part.key_index, query, key)
        with on_device(query.device):
            if isinstance(part, OffsetsPart):
                return launch_offsets.offsets_forward(part, query, key, value, scores)
            return launch_block.block_forward(_held_lists(part, query), query, key, value, scores)

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        options: ScoreOptions,
    ) -> Gradients:  # fmt: skip
        from sa_hf.ops.triton import launch_block, launch_offsets
        from sa_hf.ops.triton.scores import Scores

        scores = Scores.of(options, part.query_index, part.key_index, query, key)
        with on_device(query.device):
            if isinstance(part, OffsetsPart):
                return launch_offsets.offsets_backward(part, query, key, value, out, lse, grad_out, scores)
            return launch_block.block_backward(_held_lists(part, query), query, key, value, out, lse, grad_out, scores)


def _lists(part: BlockPart | SegmentPart, device: torch.device) -> TileLists:
    return segment_lists(part, device) if isinstance(part, SegmentPart) else layout_lists(part.layout)


def _held_lists(part: BlockPart | SegmentPart, query: Tensor) -> TileLists:
    lists = _lists(part, query.device)
    hold(query, part, lists)
    return lists


def interpreting() -> bool:
    """Whether the kernels are (or would be) made by Triton's interpreter."""
    made = sys.modules.get("sa_hf.ops.triton.common")
    if made is None:
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return type(made.load_item).__name__ == "InterpretedFunction"


def _machine_reason(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton; Linux on x86_64)"
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
    return None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make it the tensor's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache(maxsize=16)
def capability(index: int | None) -> int:
    """Compute capability of a CUDA device times 10."""
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor
