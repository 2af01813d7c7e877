"""The memory of temporaries on the CPU."""

from __future__ import annotations

from functools import cache

import torch

# The largest chunk that glibc learns from (DEFAULT_MMAP_THRESHOLD_MAX of malloc, 32 MB), less its own header.
LARGEST_LEARNED = 2**25 - 2**13


@cache
def keep_freed_memory() -> None:
    """Have the allocator keep what a batch of tiles frees for the next one, once per process.

    glibc gives freed memory back to the system beyond twice the largest chunk that it has seen freed. Until that is a
    large one, the few megabytes of each batch go back and come again page by page, which the time of long
    inputs shows. One untouched chunk, freed, raises that to 64 MB (mallopt(3), M_TRIM_THRESHOLD); other allocators
    take no notice.
    """
    torch.empty(LARGEST_LEARNED, dtype=torch.uint8)
