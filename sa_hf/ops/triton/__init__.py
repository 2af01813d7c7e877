"""The Triton engine: kernels for GPUs. Importing it needs neither triton nor a GPU."""

from sa_hf.ops.triton.engine import TritonEngine

__all__ = ["TritonEngine"]
