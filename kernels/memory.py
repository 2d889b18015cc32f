"""Memory that is the system's until it is written to."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def reserved_zeros(shape: Sequence[int], dtype: torch.dtype, piece: int) -> Tensor:
    """Zeros [shape] on the CPU that take memory when they are written, page by page, and none before.

    ``piece`` is how many bytes are filled one after the other. Where that is some huge pages, the memory comes in those
    (fewer TLB misses); where it is less, a huge page would be taken whole for a few rows of it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(*shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if piece >= 4 * HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
