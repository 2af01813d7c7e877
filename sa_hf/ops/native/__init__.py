"""The native engine: tiles in plain torch on any device, and torch's own flash attention op where the CPU has it."""

from sa_hf.ops.native.engine import NativeEngine

__all__ = ["NativeEngine"]
