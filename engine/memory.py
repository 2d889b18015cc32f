"""What the allocator of a process keeps of memory that nothing is in, and that there is no more of it."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

M_ARENA_MAX = -8
"""The number by which glibc's mallopt knows that setting."""


def trim() -> None:
    """Has the allocator give memory that is free to the system, for example after a start."""
    gc.collect()
    give_back_free()


def give_back_free() -> None:
    """The same of what is free already, without a search for more of it: others can run meanwhile.

    Between pieces in use the allocator keeps what is free otherwise: hundreds of MiB after weights were replaced.
    """
    with suppress(OSError, AttributeError):  # what is not glibc keeps less of what is free, or has no such call
        ctypes.CDLL(None).malloc_trim(0)


def share_arena() -> None:
    """Has all threads that begin from now on allocate from one place: glibc reserves 64 MiB of addresses for each of
    them otherwise, which count where addresses are limited (RLIMIT_AS) though nothing is in them."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that there is no memory; torch has an error of its own for GPUs, and else a sentence."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
