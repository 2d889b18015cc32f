"""The step loop: schedule, execute, commit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from slipstream.engine.messages import DrafterStats, EngineStats, TokenDelta, TrafficStats
from slipstream.engine.plan import StepPlan, StepResult
from slipstream.engine.scheduler import Scheduler

Deliver = Callable[[list[TokenDelta], EngineStats], None]
Execute = Callable[[StepPlan], StepResult]


class EngineCore:
    """Drives the scheduler and the runner. ``step`` is the plain loop or its pipelined twin, as configured.

    Both give every request the same tokens. The pipelined loop plans the next step while the device runs this one and
    delivers results while it runs the next; a request that ends unexpectedly costs it one unused row.
    """

    def __init__(self, scheduler: Scheduler, execute: Execute, deliver: Deliver, pipeline: bool) -> None:
        self.scheduler = scheduler
        self._execute = execute
        self._deliver = deliver
        self._device: ThreadPoolExecutor | None = None
        self._running: tuple[StepPlan, Future[StepResult]] | None = None
        self._steps = 0
        self._model_seconds = self._device_cpu_seconds = 0.0
        self._drafters: list[DrafterStats] = []
        self.traffic: Callable[[], TrafficStats] = TrafficStats
        """What became of the requests that may be kept."""
        self._began = time.thread_time()
        if pipeline:
            self._device = ThreadPoolExecutor(1, "device")
            # The device thread needs the interpreter only between steps, and then at once.
            sys.setswitchinterval(0.0005)
        self.step = self._step_ahead if pipeline else self._step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._running is not None

    def stats(self, plan: StepPlan | None = None, seconds: float = 0.0) -> EngineStats:
        """A snapshot, after ``plan`` took so many seconds."""
        return self.scheduler.stats(
            step_tokens=plan.num_tokens if plan else 0,
            step_seconds=seconds,
            steps=self._steps,
            drafters=self._drafters,
            traffic=self.traffic(),
            model_seconds=self._model_seconds,
            overhead_cpu_seconds=time.thread_time() - self._began + self._device_cpu_seconds,
        )

    def drain(self) -> None:
        """Waits for the step under way and commits it, so that nothing is in flight."""
        if self._running is not None:
            (current, future), self._running = self._running, None
            self._commit(current, future.result())

    def close(self) -> None:
        if self._device is not None:
            self._device.shutdown()

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is None:
            self._tell(self.scheduler.take_ended())
            return
        cpu_began = time.thread_time()
        result = self._execute(plan)
        # This thread's own time counts from _began on; what the device did is not overhead.
        self._began += time.thread_time() - cpu_began
        self._commit(plan, result)

    def _step_ahead(self) -> None:
        assert self._device is not None
        plan = self.scheduler.schedule()
        following = (plan, self._device.submit(self._execute, plan)) if plan is not None else None
        if self._running is not None:
            current, future = self._running
            self._commit(current, future.result())
        elif plan is None:
            self._tell(self.scheduler.take_ended())
        self._running = following

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        self._steps += 1
        self._model_seconds += result.model_seconds
        self._drafters = result.drafters
        self._device_cpu_seconds += result.overhead_cpu_seconds
        deltas = self.scheduler.commit(plan, result)
        self._deliver(deltas, self.stats(plan, result.seconds))

    def _tell(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self._deliver(deltas, self.stats())
