"""The ctypes structures of calls, read from ``call.h``, where their fields are declared."""

from __future__ import annotations

import ctypes
import re

import torch
from torch import Tensor

from sa_hf.ops.cpp.sources import FILES

FAR = 2**40


class CallRows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((x, ctypes.c_int64) for x in ("batch_step", "head_step", "step")))

    @classmethod
    def of(cls, x: Tensor) -> CallRows:
        """Where a tensor ``[B, H, N, D]`` lies."""
        return cls(x.data_ptr(), *x.stride()[:3])


class CallIndex(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((x, ctypes.c_int64) for x in ("batch_step", "head_step")))


def _declared(struct: str) -> list[tuple[str, str]]:
    """The fields of a struct: name and type."""
    body = FILES["call.h"].partition(f"struct {struct} {{")[2].partition("\n};")[0]
    declarations = re.findall(r"^\s*((?:const )?\w+\*?) ([\w, ]+);", body, re.MULTILINE)
    return [(name, kind) for kind, names in declarations for name in names.split(", ")]


_TYPES = {"Rows": CallRows, "Index": CallIndex, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
_POINTED = {"float": torch.float32, "int32_t": torch.int32, "int64_t": torch.int64, "uint64_t": torch.int64}
# Of the tensor behind each pointer.
DTYPES = {name: _POINTED[kind.removeprefix("const ")[:-1]] for name, kind in _declared("Call") if kind.endswith("*")}


class Call(ctypes.Structure):
    _fields_ = tuple((name, _TYPES.get(kind, ctypes.c_void_p)) for name, kind in _declared("Call"))


class DecodeCall(ctypes.Structure):
    _fields_ = tuple((name, _TYPES.get(kind, ctypes.c_void_p)) for name, kind in _declared("DecodeCall"))


class ChoiceCall(ctypes.Structure):
    _fields_ = tuple((name, _TYPES.get(kind, ctypes.c_void_p)) for name, kind in _declared("ChoiceCall"))


class ClusterCall(ctypes.Structure):
    _fields_ = tuple((name, _TYPES.get(kind, ctypes.c_void_p)) for name, kind in _declared("ClusterCall"))
