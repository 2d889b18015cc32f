"""torch's profiler around some steps, as a trace that browsers show (chrome://tracing, Perfetto)."""

from __future__ import annotations

import time
from concurrent.futures import Future

from torch.profiler import ProfilerActivity, profile, record_function

from slipstream.engine.core import NOTHING, EngineCore
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.operations import Profile


class StepProfiler:
    """For the thread of the steps: ``start``, then ``poll`` between two steps until the future is done."""

    def __init__(self, core: EngineCore, on_gpu: bool) -> None:
        self._core = core
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._under_way: tuple[Profile, Future[int], profile, int, float] | None = None

    @property
    def has_work(self) -> bool:
        return self._under_way is not None

    def start(self, asked: Profile) -> Future[int]:
        """The future is how many steps the trace has. Raises SlipstreamError if somebody else profiles."""
        if self._under_way is not None:
            raise SlipstreamError("the engine is being profiled already")
        profiler = profile(activities=self._activities, record_shapes=asked.shapes)
        profiler.start()
        self._core.annotate = record_function
        done: Future[int] = Future()
        self._under_way = asked, done, profiler, self._core.num_steps, time.monotonic()
        return done

    def poll(self) -> None:
        if self._under_way is None:
            return
        asked, _, _, first, began = self._under_way
        if self._core.num_steps - first >= asked.steps or time.monotonic() - began >= asked.seconds:
            self._core.drain()
            self._finish()

    def close(self) -> None:
        if self._under_way is not None:
            self._finish()

    def _finish(self) -> None:
        assert self._under_way is not None
        (asked, done, profiler, first, _), self._under_way = self._under_way, None
        self._core.annotate = NOTHING
        steps = self._core.num_steps - first
        try:
            profiler.stop()
            profiler.export_chrome_trace(asked.path)
        except Exception as error:
            done.set_exception(SlipstreamError(f"the trace could not be written: {error}"))
        else:
            done.set_result(steps)
