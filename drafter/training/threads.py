"""Threads that compute parts of the same thing side by side.

Torch can share each operation among threads instead. Then every operation waits for the last of them, and where other
programs run, as beside a server that is busy, that is most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Lock
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """The caller's thread and some others; operations of torch are meant to use one core each."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._others = ThreadPoolExecutor(count - 1, "training") if count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results in the order of ``items``, which are taken one after the other by whichever thread is free.

        Raises what ``function`` raises, once no thread computes any more.
        """
        waiting = enumerate(list(items))
        found: dict[int, Result] = {}
        lock = Lock()

        def work() -> None:
            while True:
                with lock:
                    taken = next(waiting, None)
                if taken is None:
                    return
                number, item = taken
                found[number] = function(item)

        beside = [self._others.submit(work) for _ in range(self.count - 1)] if self._others else []
        try:
            work()
        finally:
            wait(beside)
        for each in beside:
            each.result()
        return [found[number] for number in range(len(found))]
