"""What this machine computes fast: found by a short measurement, once per process."""

from __future__ import annotations

import time
from functools import cache

import torch

FORMATS = (torch.float32, torch.bfloat16)
"""Tried in this order; a later one must be clearly faster, since an earlier one is more exact."""
CLEARLY = 1.1
ROWS, WIDTH = 256, 1024
"""Large enough that the arithmetic outweighs the call, small enough to take milliseconds on the slowest processor."""
RUNS = 5


@cache
def matmul_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of torch's matrix product on the CPU, with the threads torch has now.

    One thread's, by the processor time that it took, times the number of threads: a training worker has the lowest
    priority, and beside requests all of its runs would be long by the clock. The best of a few runs, since whoever
    shares the caches makes runs longer, too.
    """
    x, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = float("inf")
        for _ in range(1 + RUNS):  # the first one also builds the kernel
            start = time.thread_time()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return threads * 2 * ROWS * WIDTH * WIDTH / best


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """The number format in which torch multiplies matrices fastest there.

    GPUs that this runs on have bfloat16 units. Among CPUs it differs by a factor of five either way: those without
    BF16 instructions convert every operand back and forth.
    """
    if device.type != "cpu":
        return torch.bfloat16
    chosen = FORMATS[0]
    for dtype in FORMATS[1:]:
        if matmul_flops(dtype) > CLEARLY * matmul_flops(chosen):
            chosen = dtype
    return chosen


def describe_speed(dtype: torch.dtype) -> str:
    """Tells people the format and what the CPU makes of it, for example ``float32, 110 GFLOP/s``."""
    return f"{str(dtype).removeprefix('torch.')}, {matmul_flops(dtype) / 1e9:.0f} GFLOP/s"
