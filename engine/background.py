"""Work beside the steps: prepared in a thread of the lowest priority, carried out between two steps."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

Land = Callable[[], Any]
Prepare = Callable[[], Land]
"""Runs in the thread; what it returns runs between two steps, and its result is the job's."""
SWITCH_SECONDS = 0.0005
SHARE_SECONDS = 0.0003
"""Of the processor during one step: on two cores that both compute, a step is longer by what it loses to others."""
_current = threading.local()


def breathe() -> None:
    """To be called between small pieces of long work: in the background it waits for the next step if it had its share.

    Elsewhere, and while there are no steps to hold up, it does nothing.
    """
    background: Background | None = getattr(_current, "background", None)
    if background is not None:
        background.breathe()


@dataclass(slots=True)
class _Job:
    prepare: Prepare
    done: Future[Any] = field(default_factory=Future)


class Background:
    """One job after the other, in the order of their arrival: the next is prepared when the one before has landed."""

    def __init__(self) -> None:
        # Begins with the first job: an engine that never has one neither waits for a thread of the lowest priority to
        # begin nor, when it closes, for it to end, which takes seconds where other processes want every core.
        self._thread = ThreadPoolExecutor(1, "background", initializer=self._begin)
        self._begun = threading.Event()
        self._waiting: deque[_Job] = deque()
        self._prepared: Future[Land] | None = None
        self._next_step = threading.Event()
        self._is_busy, self._since = False, 0.0
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

    def poll(self, is_busy: bool = False) -> None:
        """Carries out what is ready; called between two steps, ``is_busy`` if another one follows now."""
        if self._prepared is None:
            return
        self._is_busy = is_busy
        self._next_step.set()
        if not self._prepared.done():
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
        self._is_busy = False
        self._next_step.set()
        self._thread.shutdown(cancel_futures=True)

    def breathe(self) -> None:
        """See the function; for the thread itself."""
        if self._is_busy and time.thread_time() - self._since >= SHARE_SECONDS:
            self._next_step.clear()
            if self._is_busy:
                self._next_step.wait()
            self._since = time.thread_time()

    def _prepare_next(self) -> None:
        if self._waiting and self._prepared is None:
            self._prepared = self._thread.submit(self._waiting[0].prepare)
            if not self._begun.is_set():
                self._let_begin()

    def _let_begin(self) -> None:
        import torch  # not above: breathe is also for tools that have no other need of it

        threads = torch.get_num_threads()
        self._begun.wait()
        torch.set_num_threads(threads)  # torch keeps the number per thread; new threads get what was set last

    def _begin(self) -> None:
        import torch

        _current.background = self
        # Threads of torch wait for each other by spinning, on the cores that the steps compute on. A thread takes the
        # common number when it asks for the first time, whatever was set for it before.
        torch.get_num_threads()
        torch.set_num_threads(1)
        self._begun.set()
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            # Gives way at once to any thread that wakes up, which one that is merely nice does only after its slice.
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
