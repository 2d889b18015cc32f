"""Memory of a process that nothing is in any more."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def trim() -> None:
    """Has the allocator give memory that is free to the system, for example after a start."""
    gc.collect()
    with suppress(OSError, AttributeError):  # what is not glibc keeps less of what is free, or has no such call
        ctypes.CDLL(None).malloc_trim(0)
