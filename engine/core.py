"""The step loop: schedule, execute, commit; and what becomes of a step that fails."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

from slipstream.engine.messages import DrafterStats, EngineStats, TokenDelta, TrafficStats
from slipstream.engine.plan import StepPlan, StepResult
from slipstream.engine.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

Deliver = Callable[[list[TokenDelta], EngineStats], None]
Annotate = Callable[[str], AbstractContextManager[object]]
_nothing = nullcontext()


def NOTHING(_: str) -> AbstractContextManager[object]:  # noqa: N802 - a constant that is called
    """Annotates nothing."""
    return _nothing


MOST_FAILURES = 3
"""Steps that may fail one after the other: beyond that it is not the requests, and the engine ends."""


class Launched(Protocol):
    """A step under way."""

    @property
    def may_wait(self) -> bool:
        """Whether another step may be launched before this one is collected."""


Step = TypeVar("Step", bound=Launched)


class Runner(Protocol[Step]):
    def launch(self, plan: StepPlan) -> Step:
        """Begins a step."""

    def fits_behind(self, plan: StepPlan, before: Step) -> bool:
        """Whether a step may be launched before that one is collected."""

    def collect(self, launched: Step) -> StepResult:
        """Waits for a step; they are collected in the order in which they were launched."""

    def reset(self) -> None:
        """Forgets all rows after a step has failed; raises if nothing can run any more."""


class Steps(Generic[Step]):
    """Runs steps in a thread of its own, one after the other; each is launched before the last one is read, if it may.

    Then the device goes from one step to the next while the host reads, tells and plans.
    """

    def __init__(self, runner: Runner[Step]) -> None:
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, "device")
        self._open: tuple[Step, Future[StepResult]] | None = None
        """The step that is launched and not collected; for the thread only."""

    def submit(self, plan: StepPlan, annotate: Annotate) -> Future[StepResult]:
        """The result may come only with the next step, or ``flush``."""
        done: Future[StepResult] = Future()
        self._thread.submit(self._run, plan, done, annotate)
        return done

    def flush(self) -> None:
        """Nothing follows for now: what is launched is collected."""
        self._thread.submit(self._collect)

    def close(self) -> None:
        self._thread.shutdown()

    def _run(self, plan: StepPlan, done: Future[StepResult], annotate: Annotate) -> None:
        with annotate("execute"):
            try:
                if self._open is not None and not self._runner.fits_behind(plan, self._open[0]):
                    self._collect()
                launched = self._runner.launch(plan)
            except Exception as error:
                self._collect()
                done.set_exception(error)
                return
            self._collect()
            self._open = launched, done
            if not launched.may_wait:
                self._collect()

    def _collect(self) -> None:
        if self._open is not None:
            (launched, done), self._open = self._open, None
            try:
                done.set_result(self._runner.collect(launched))
            except Exception as error:
                done.set_exception(error)


class EngineCore:
    """Drives the scheduler and the runner. ``step`` is the plain loop or its pipelined twin, as configured.

    Both give every request the same tokens. The pipelined loop plans the next step while the device runs this one and
    delivers results while it runs the next; a request that ends unexpectedly costs it one unused row.

    What goes wrong with one request is told in the step's result. If the step itself raises, nobody knows what it has
    left behind, in the cache and in the tables: its requests end with an error, and everybody else starts over from
    the known tokens, with an empty cache.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner[Any],
        deliver: Deliver,
        pipeline: bool,
        drafters: Sequence[DrafterStats] = (),
        traffic: Callable[[], TrafficStats] = TrafficStats,
    ) -> None:
        """``drafters`` are the counters before the first step; ``traffic`` tells those of requests that may be kept."""
        self.scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._device: Steps[Any] | None = None
        self._running: tuple[StepPlan, Future[StepResult]] | None = None
        self._steps = self._failures = 0
        self._model_seconds = self._verify_seconds = self._draft_seconds = self._device_cpu_seconds = 0.0
        self._drafters = list(drafters)
        self._traffic = traffic
        self.annotate: Annotate = NOTHING
        """Around the parts of a step, by their names: for profilers."""
        self._began = time.thread_time()
        if pipeline:
            self._device = Steps(runner)
            # The device thread needs the interpreter only between steps, and then at once.
            sys.setswitchinterval(0.0005)
        self.step = self._step_ahead if pipeline else self._step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._running is not None

    @property
    def num_steps(self) -> int:
        """Steps committed so far."""
        return self._steps

    def stats(self, plan: StepPlan | None = None, seconds: float = 0.0) -> EngineStats:
        """A snapshot, after ``plan`` took so many seconds."""
        return self.scheduler.stats(
            step_tokens=plan.num_tokens if plan else 0,
            step_seconds=seconds,
            steps=self._steps,
            drafters=self._drafters,
            traffic=self._traffic(),
            model_seconds=self._model_seconds,
            verify_seconds=self._verify_seconds,
            draft_seconds=self._draft_seconds,
            overhead_cpu_seconds=time.thread_time() - self._began + self._device_cpu_seconds,
        )

    def drain(self) -> None:
        """Waits for the step under way and commits it, so that nothing is in flight."""
        if self._running is not None:
            (current, future), self._running = self._running, None
            self._flush()
            self._land(current, future.result)

    def close(self) -> None:
        if self._device is not None:
            self._device.close()

    def _step(self) -> None:
        plan = self._plan()
        if plan is None:
            self._tell(self.scheduler.take_ended())
            return
        self._land(plan, lambda: self._run(plan))

    def _plan(self) -> StepPlan | None:
        with self.annotate("schedule"):
            return self.scheduler.schedule()

    def _run(self, plan: StepPlan) -> StepResult:
        cpu_began = time.thread_time()
        try:
            with self.annotate("execute"):
                return self._runner.collect(self._runner.launch(plan))
        finally:
            # This thread's own time counts from _began on; what the device did is not overhead.
            self._began += time.thread_time() - cpu_began

    def _step_ahead(self) -> None:
        assert self._device is not None
        plan = self._plan()
        before = self._running
        self._running = (plan, self._device.submit(plan, self.annotate)) if plan is not None else None
        if plan is None:
            self._device.flush()
        if before is not None:
            self._land(before[0], before[1].result)
        elif plan is None:
            self._tell(self.scheduler.take_ended())

    def _flush(self) -> None:
        if self._device is not None:
            self._device.flush()

    def _land(self, plan: StepPlan, result: Callable[[], StepResult]) -> None:
        try:
            found = result()
        except Exception as error:
            self._fail(plan, error)
        else:
            self._failures = 0
            with self.annotate("commit"):
                self._commit(plan, found)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        self._failures += 1
        if self._failures == MOST_FAILURES:
            raise error
        log.error("a step over %d requests failed: they end with an error", len(plan.slots), exc_info=error)
        if self._running is not None:  # it was planned on what this step should have left
            self._flush()
            wait([self._running[1]])
            self._running = None
        self._runner.reset()
        self._tell(self.scheduler.fail(f"the step that computed the request failed: {type(error).__name__}: {error}"))

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        self._steps += 1
        self._model_seconds += result.model_seconds
        if any(result.drafted):
            self._verify_seconds += result.model_seconds
        self._draft_seconds += result.draft_seconds
        self._drafters = result.drafters
        self._device_cpu_seconds += result.overhead_cpu_seconds
        deltas = self.scheduler.commit(plan, result)
        self._deliver(deltas, self.stats(plan, result.seconds))

    def _tell(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self._deliver(deltas, self.stats())
