"""When requests are sent: closed loop of fixed concurrency, or open loop of Poisson arrivals."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """``concurrency`` streams; each sends its next request when the last one has ended."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency}")

    def describe(self) -> str:
        return f"{self.concurrency} concurrent"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests arrive independently of the answers: Poisson with ``rate`` per second, or all at once (``inf``)."""

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0 requests per second, not {self.rate}")

    def describe(self) -> str:
        return "all at once" if math.isinf(self.rate) else f"{self.rate:g} requests/s (Poisson)"

    def offsets(self, count: int) -> list[float]:
        """Seconds from the start to each arrival, ascending; the first request arrives at 0."""
        if math.isinf(self.rate):
            return [0.0] * count
        random = Random(f"arrivals {self.seed}")
        offsets = [0.0]
        while len(offsets) < count:
            offsets.append(offsets[-1] + random.expovariate(self.rate))
        return offsets[:count]


Arrivals = ClosedLoop | OpenLoop


async def drive(items: Sequence[T], arrivals: Arrivals, send: Callable[[T, float], Awaitable[None]]) -> None:
    """Call ``send(item, due)`` for every item as ``arrivals`` says, and wait for all of them.

    ``due`` is the ``perf_counter`` time at which the item should be sent; in a closed loop, when its stream was free.
    """
    match arrivals:
        case ClosedLoop(concurrency):
            queue = iter(items)

            async def stream() -> None:
                for item in queue:
                    await send(item, perf_counter())

            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(concurrency, len(items))):
                    tasks.create_task(stream())
        case OpenLoop():
            start = perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for item, offset in zip(items, arrivals.offsets(len(items)), strict=True):
                    due = start + offset
                    if (wait := due - perf_counter()) > 0:
                        await asyncio.sleep(wait)
                    tasks.create_task(_awaited(send(item, due)))


async def _awaited(call: Awaitable[None]) -> None:
    await call
