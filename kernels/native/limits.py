"""What this machine can do at most with the compiled kernels: how fast it reads memory, and how fast it computes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from slipstream.kernels.native.library import DTYPE_CODES, address, load

Clock = Callable[[], float]
CODES = {**DTYPE_CODES, torch.int8: 2}
"""Formats of numbers that are multiplied; int8 is what quantised weights are multiplied as, unless exactly."""
LARGEST = 256 << 20
"""Bytes that no cache holds."""
PIECE_S = 0.02
"""Long enough that starting does not count, short enough that others seldom come between."""


def read_bandwidth(clock: Clock = time.perf_counter, rounds: int = 6) -> float:
    """Bytes per second that all threads together read of memory; the best of some rounds."""
    library = load()
    assert library is not None
    memory = torch.ones(LARGEST // 4)
    best = float("inf")
    for _ in range(rounds):
        began = clock()
        library.slip_read(address(memory), len(memory))
        best = min(best, clock() - began)
    return memory.nbytes / best


def peak_flops(dtype: torch.dtype, clock: Clock = time.perf_counter, rounds: int = 6) -> float:
    """Multiplications and additions per second of all threads, with numbers of this format; the best of some rounds."""
    library = load()
    assert library is not None
    times, best, measured = 1000, 0.0, 0
    while measured < rounds:
        began = clock()
        operations = library.slip_multiply(CODES[dtype], times)
        seconds = clock() - began
        if seconds < PIECE_S:
            times *= 2
        else:
            best, measured = max(best, operations / seconds), measured + 1
    return best
