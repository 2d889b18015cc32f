"""Keeps an engine running: where one has died, or hangs, another takes over."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn

from slipstream.engine.errors import EngineLostError, SlipstreamError
from slipstream.engine.handle import EngineHandle
from slipstream.engine.messages import EngineStats
from slipstream.engine.operations import Pause, ReleaseMemory

StartEngine = Callable[[EngineHandle | None], Awaitable[EngineHandle]]
"""Starts an engine, given the one that it replaces."""
logger = logging.getLogger(__name__)
FIRST_PAUSE_S = 0.5
"""Pause before the next start after one that failed; doubles with each that fails."""
MAX_FAILED_STARTS = 6
"""Most failed starts in a row. What keeps an engine from starting seldom goes by itself; memory of others may."""
LOOK_SECONDS = 1.0


class Restarts:
    """Whether and when an engine that has ended is started again. It has no clock, but is told how long each served."""

    def __init__(self, limit: int, window_s: float) -> None:
        """At most ``limit`` restarts within so many seconds of serving: the time that starts take does not count."""
        self._limit, self._window_s = limit, window_s
        self._served_s = 0.0
        self._ends: deque[float] = deque()
        """When engines ended, in seconds of serving."""
        self._failed = 0
        """Starts in a row that failed."""

    def pause(self, served_s: float | None) -> float | None:
        """Seconds until the next start, now that an engine has ended; None: there is none.

        ``served_s``: how long it had been ready; None if it did not come up.
        """
        self._failed = self._failed + 1 if served_s is None else 0
        self._served_s += served_s or 0.0
        while self._ends and self._ends[0] < self._served_s - self._window_s:
            self._ends.popleft()
        self._ends.append(self._served_s)
        if len(self._ends) > self._limit or self._failed >= MAX_FAILED_STARTS:
            return None
        return FIRST_PAUSE_S * 2 ** (self._failed - 1) if self._failed else 0.0


class EngineSupervisor:
    """Owns the engine that serves now. ``start``, then ``run`` until it is cancelled or gives up, then ``close``."""

    def __init__(
        self,
        start: StartEngine,
        restarts: Restarts,
        hang_s: float,
        on_start: Callable[[EngineHandle], None],
        stays_paused: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args:
            start: starts an engine; given the one that it replaces.
            hang_s: an engine that has given no sign of life for so long is killed; 0: never.
            on_start: called with every engine once it is ready, before anybody can send it requests.
            stays_paused: whether a pause lasts that an engine has ended in.
        """
        self.restarts = 0
        """Engines that took over."""
        self.lost = False
        """Whether the supervisor has given up."""
        self._start, self._policy, self._hang_s, self._on_start = start, restarts, hang_s, on_start
        self._stays_paused = stays_paused
        self._engine: EngineHandle | None = None
        self._start_seconds = 0.0
        """What the last start took."""
        self._ready_at = 0.0
        self._back_at: float | None = None
        """When another engine should be ready; None where none is being started."""

    @property
    def is_up(self) -> bool:
        return self._engine is not None and self._engine.failure is None

    @property
    def has_started(self) -> bool:
        """Whether there is an engine to ask about, dead or alive."""
        return self._engine is not None

    @property
    def engine(self) -> EngineHandle:
        """The one that serves, or that served last."""
        assert self._engine is not None, "the engine is not loaded"
        return self._engine

    @property
    def seconds_left(self) -> int:
        """Seconds until requests are served again, if all goes well; at least 1."""
        if self.is_up:
            return 1
        now = time.monotonic()
        back_at = now + self._start_seconds if self._back_at is None else self._back_at
        return max(math.ceil(back_at - now), 1)

    async def start(self) -> None:
        """Raises what ``start`` raises: the first engine is not tried twice."""
        await self._replace()

    async def run(self) -> NoReturn:
        """Replaces engines until cancelled. Raises EngineLostError when it gives up."""
        while True:
            await self._until_end(self.engine)
            await self._restart()

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()

    async def _replace(self) -> None:
        began = time.monotonic()
        before = self._engine
        engine = await self._start(before)
        if before is not None:
            await self._take_over(before.stats, engine)
        self._ready_at = time.monotonic()
        self._start_seconds = self._ready_at - began
        self._on_start(engine)
        self._engine, self._back_at = engine, None

    async def _take_over(self, before: EngineStats, engine: EngineHandle) -> None:
        """Brings a new engine to the state of the one that has ended, as far as that can be had again."""
        # Whoever paused it for good has not resumed it, and may be about to send it weights.
        if before.is_paused and self._stays_paused():
            await engine.call(Pause("keep"))
        if before.released:  # whoever has its memory now needs it until the engine is woken up
            await engine.call(ReleaseMemory(before.released, keep_weights=False))
        if before.target_version:
            logger.error(
                "the engine that ended had version %d of the target's weights, the new one has those of the model's "
                "files (version 0): send the update again",
                before.target_version,
            )

    async def _until_end(self, engine: EngineHandle) -> None:
        """Waits until it has ended; ends it if it hangs. Engines give a sign of life with every step and every second.

        Looks without news are counted, not the clock asked: this process may have stood still, and not the engine.
        """
        interval = min(LOOK_SECONDS, self._hang_s / 4) if self._hang_s else LOOK_SECONDS
        last, silent_s = engine.last_step_at, 0.0
        while not engine.ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(engine.ended.wait(), interval)
            silent_s = silent_s + interval if engine.last_step_at == last else 0.0
            last = engine.last_step_at
            if self._hang_s and silent_s >= self._hang_s:
                logger.error("the engine has given no sign of life for %g s: killing it", silent_s)
                engine.kill()

    async def _restart(self) -> None:
        reason = self.engine.failure
        served_s: float | None = time.monotonic() - self._ready_at
        while (pause := self._policy.pause(served_s)) is not None:
            self.restarts += 1
            self._back_at = time.monotonic() + pause + self._start_seconds
            when = f"in {pause:g} s" if pause else "now"
            logger.error("%s; starting it again %s (restart %d)", reason, when, self.restarts)
            await asyncio.sleep(pause)
            try:
                await self._replace()
            except SlipstreamError as error:
                reason, served_s = f"the engine could not be started: {error}", None
            except Exception as error:
                logger.exception("starting the engine failed")
                reason, served_s = f"the engine could not be started: {type(error).__name__}: {error}", None
            else:
                logger.info("the engine serves again after %.1f s", pause + self._start_seconds)
                return
        self.lost = True
        message = f"{reason}; giving up after {self.restarts} restarts"
        logger.error("%s", message)
        raise EngineLostError(message)
