"""How long something takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
"""Written before every measurement: more than any cache of a GPU holds."""
AHEAD_CYCLES = 2_000_000
"""For about a millisecond the device waits, so that launching is over before what is measured begins."""
WARM_UPS = 3


def seconds(run: Callable[[], object], device: torch.device, most_s: float = 0.5, most_runs: int = 50) -> float:
    """Median of several runs, as many as fit into ``most_s`` seconds.

    On a GPU three at least, with cold caches, and what it takes there: what the host does meanwhile does not count as
    long as it is below a millisecond.
    """
    if device.type == "cuda":
        return _on_gpu(run, device, most_s, most_runs)
    found: list[float] = []
    while not found or (sum(found) < most_s and len(found) < most_runs):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return median(found)


def _on_gpu(run: Callable[[], object], device: torch.device, most_s: float, most_runs: int) -> float:
    for _ in range(WARM_UPS):  # the first one compiles
        run()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    runs = max(3, min(most_runs, int(most_s / max(time.perf_counter() - began, 1e-6))))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [[_event() for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return median(float(begin.elapsed_time(end)) for begin, end in events) / 1e3


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
