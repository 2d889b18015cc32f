"""Work beside the steps: prepared in a thread that gets a slice of time after every step, carried out between two.

While there are steps, the thread runs when their loop waits for it, and at no other time: it takes neither a core nor
the interpreter from a step, and no busy thread keeps it from its share. A slice is a part of what the last step took, a
quarter at first; the part doubles with every DOUBLING_S that the work has taken, up to as much as the step. So what is
late or large gets half of the time in the end, and never more.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from slipstream.engine.errors import SupersededError

Land = Callable[[], Any]
Prepare = Callable[[], Land]
"""Runs in the thread; what it returns runs between two steps, and its result is the job's."""
FIRST_SHARE = 0.25
DOUBLING_S = 0.5
FULL_AFTER = 2
"""Doublings after which a slice is as long as a step."""
SWITCH_S = 0.0005
_current = threading.local()


def breathe() -> None:
    """To be called between pieces of long work, of less than a millisecond: in the background it waits for the next
    step if the work had its share, and ends it if nobody needs it any more.

    Elsewhere, and while there are no steps to hold up, it does nothing.
    """
    background: Background | None = getattr(_current, "background", None)
    if background is not None:
        background.breathe()


def is_beside_steps() -> bool:
    """Whether this is work in the background, which has to come in such pieces."""
    return getattr(_current, "background", None) is not None


def done(result: Any) -> Future[Any]:
    """The future of what needed no background."""
    future: Future[Any] = Future()
    future.set_result(result)
    return future


class _Unneeded(BaseException):
    """Raised in the work itself, which must not take it for an error of its own."""


@dataclass(slots=True, eq=False)
class _Job:
    prepare: Prepare
    key: Hashable
    since: float
    done: Future[Any] = field(default_factory=Future)
    prepared: Future[Land] | None = None
    """Once it is its turn; it is done before the thread gives up the turn in which it ended."""
    unneeded: bool = False

    @property
    def is_prepared(self) -> bool:
        return self.prepared is not None and self.prepared.done()


class Background:
    """One job after the other, in the order of their arrival; of those with the same key only the latest.

    All methods but ``breathe`` are for the thread of the steps.
    """

    def __init__(
        self, settle: Callable[[], object] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """``settle`` is called before anything is carried out, so that no step is under way that began before."""
        self._settle = settle
        # Begins with the first job: an engine that never has one needs no thread. Not one of an executor, which Python
        # waits for at its end: work may be waiting for a step that never comes.
        self._thread: threading.Thread | None = None
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._clock = clock
        self._jobs: list[_Job] = []
        """The first one is being prepared."""
        self._resumed = clock()
        """When the steps went on after ``poll``."""
        self._is_busy = False
        self._begun = threading.Event()
        self._turn = threading.Condition()
        """Guards what follows: whether it is the thread's turn, and until when."""
        self._has_turn, self._until = False, 0.0
        # A piece may still be under way when its slice is over. The thread of the steps gets the interpreter soon when
        # it wants it; 5 ms later is Python's default.
        sys.setswitchinterval(SWITCH_S)

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def start(self, prepare: Prepare, key: Hashable = None) -> Future[Any]:
        """The future gets its result in ``poll``, or the exception that either part raised.

        Jobs of the same key that have not landed end with SupersededError; this one is as late as the first of them, so
        that decisions that come ever so fast cannot keep one another from taking effect.
        """
        since = min([self._clock(), *(job.since for job in self._jobs if key is not None and job.key == key)])
        if key is not None:
            self.supersede(key)
        job = _Job(prepare, key, since)
        self._jobs.append(job)
        self._prepare_next()
        return job.done

    def supersede(self, key: Hashable) -> bool:
        """What is to be done now makes the jobs of this key superfluous; whether there were any."""
        superseded = [job for job in self._jobs if job.key == key]
        self._jobs = [job for job in self._jobs if job.key != key]
        for job in superseded:
            job.unneeded = True
            job.done.set_exception(SupersededError(f"a later decision about {key!r} came before this one took effect"))
        self._prepare_next()
        return bool(superseded)

    def poll(self, is_busy: bool = False) -> None:
        """Carries out what is ready; called between two steps, ``is_busy`` if another one follows now."""
        step = self._clock() - self._resumed if self._is_busy else 0.0
        if is_busy != self._is_busy:
            with self._turn:
                self._is_busy = is_busy
                self._turn.notify_all()
        if is_busy and self._jobs:
            self._grant(self._jobs[0], step)
        while self._jobs and self._jobs[0].is_prepared:
            self._land(self._jobs.pop(0))
            self._prepare_next()
        self._resumed = self._clock()

    def close(self) -> None:
        """Forgets what is being prepared."""
        for job in self._jobs:
            job.unneeded = True
        with self._turn:
            self._is_busy = False
            self._turn.notify_all()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def breathe(self) -> None:
        """See the function; for the thread itself."""
        if self._is_busy and self._clock() >= self._until:
            with self._turn:
                self._has_turn = False
                self._turn.notify_all()
                self._turn.wait_for(lambda: self._has_turn or not self._is_busy)
        if _current.job.unneeded:
            raise _Unneeded

    def _grant(self, job: _Job, step: float) -> None:
        """Lets the thread run for its share of a step's seconds, and waits for it no longer than that."""
        now = self._clock()
        share = FIRST_SHARE * 2 ** min((now - job.since) / DOUBLING_S, FULL_AFTER)
        seconds = min(share, 1.0) * step
        with self._turn:
            if job.is_prepared:
                return
            self._until, self._has_turn = now + seconds, True
            self._turn.notify_all()
            self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        """Waits until the thread has used its turn or has nothing more to do."""
        self._turn.wait_for(lambda: not self._has_turn, seconds)

    def _land(self, job: _Job) -> None:
        assert job.prepared is not None
        self._settle()
        try:
            job.done.set_result(job.prepared.result()())
        except Exception as error:
            job.done.set_exception(error)
        del job  # an error knows this frame: they would keep each other, and all that the job refers to

    def _prepare_next(self) -> None:
        if self._jobs and self._jobs[0].prepared is None:
            self._jobs[0].prepared = Future()
            self._queue.put(self._jobs[0])
            if self._thread is None:
                self._let_begin()

    def _run(self) -> None:
        """What the thread does."""
        self._begin()
        while (job := self._queue.get()) is not None:
            self._prepare(job)
            del job, _current.job  # half of a model's weights may be in it, which nobody else may want any more

    def _prepare(self, job: _Job) -> None:
        assert job.prepared is not None
        _current.job = job
        land: Land | None = None
        failed: BaseException | None = None
        try:
            self.breathe()
            land = job.prepare()
        except BaseException as error:
            failed = error
        with self._turn:
            if land is not None:
                job.prepared.set_result(land)
            else:
                job.prepared.set_exception(failed)
            self._has_turn, self._until = False, 0.0  # the next job waits for a turn of its own
            self._turn.notify_all()
        del failed, job  # as in _land

    def _let_begin(self) -> None:
        import torch  # not above: breathe is also for tools that have no other need of it

        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)
        self._thread.start()
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
