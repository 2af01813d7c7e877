"""The memory of temporaries and results on the CPU."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# The largest chunk that glibc learns from (DEFAULT_MMAP_THRESHOLD_MAX of malloc, 32 MB), less its own header.
LARGEST_LEARNED = 2**25 - 2**13
# Tensors from so many bytes on ask for large pages, as NumPy's arrays do.
LARGE = 2**22
LARGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone


@cache
def keep_freed_memory() -> None:
    """Have the allocator keep what a batch of tiles frees for the next one, once per process.

    glibc gives freed memory back to the system beyond twice the largest chunk that it has seen freed. Until that is a
    large one, the few megabytes of each batch go back and come again page by page, which the time of long
    inputs shows. One untouched chunk, freed, raises that to 64 MB (mallopt(3), M_TRIM_THRESHOLD); other allocators
    take no notice.
    """
    torch.empty(LARGEST_LEARNED, dtype=torch.uint8)


def large_empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``torch.empty`` on the CPU, in pages of 2 MB where Linux hands those out on request (``transparent_hugepage``
    is ``madvise``). A result of 32 MB is else 8192 pages, each of which the system clears when it is first written:
    where a pattern keeps few pairs, that costs as much as the attention."""
    x = torch.empty(shape, dtype=dtype, device="cpu")
    if LARGE_PAGES is not None and x.nbytes >= LARGE:
        skipped = -x.data_ptr() % mmap.PAGESIZE
        _madvise()(x.data_ptr() + skipped, x.nbytes - skipped, LARGE_PAGES)  # what it answers changes nothing
    return x


def large_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`large_empty`, filled with zeros."""
    return large_empty(*shape, dtype=dtype).zero_()


@cache
def _madvise() -> Callable[[int, int, int], int]:
    """The C library's."""
    advise: Callable[[int, int, int], int] = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]  # type: ignore[attr-defined]
    return advise
