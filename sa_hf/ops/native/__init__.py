"""The native engine: kernels in C++ on the CPU, compiled at first use, and tiles in plain torch on any device."""

from sa_hf.ops.native.engine import NativeEngine

__all__ = ["NativeEngine"]
