"""Work beside the steps: prepared in a thread of the lowest priority, carried out between two steps."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

Land = Callable[[], Any]
Prepare = Callable[[], Land]
"""Runs in the thread; what it returns runs between two steps, and its result is the job's."""
SWITCH_SECONDS = 0.0005


@dataclass(slots=True)
class _Job:
    prepare: Prepare
    done: Future[Any] = field(default_factory=Future)


class Background:
    """One job after the other, in the order of their arrival: the next is prepared when the one before has landed."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "background", initializer=_lower_priority)
        self._waiting: deque[_Job] = deque()
        self._prepared: Future[Land] | None = None
        # The thread of the steps gets the interpreter at once when it wants it; 5 ms later is Python's default.
        sys.setswitchinterval(SWITCH_SECONDS)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def start(self, prepare: Prepare) -> Future[Any]:
        """The future gets its result in ``poll``, or the exception that either part raised."""
        job = _Job(prepare)
        self._waiting.append(job)
        self._prepare_next()
        return job.done

    def poll(self) -> None:
        """Carries out what is ready; called between two steps."""
        if self._prepared is None or not self._prepared.done():
            return
        job, prepared = self._waiting.popleft(), self._prepared
        self._prepared = None
        try:
            job.done.set_result(prepared.result()())
        except Exception as error:
            job.done.set_exception(error)
        self._prepare_next()

    def close(self) -> None:
        """Waits for what is being prepared and forgets it."""
        self._thread.shutdown(cancel_futures=True)

    def _prepare_next(self) -> None:
        if self._waiting and self._prepared is None:
            self._prepared = self._thread.submit(self._waiting[0].prepare)


def _lower_priority() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        # Gives way at once to any thread that wakes up, which one that is merely nice does only after its slice.
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
