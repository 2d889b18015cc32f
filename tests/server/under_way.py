"""What is under way while a test looks at it, however long it takes to: requests, and engines that come up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from slipstream.engine.plan import StepPlan
from slipstream.engine.scheduling.scheduler import Scheduler

STEP_S = 0.03
SHORT = {"prompt": "Hello", "max_tokens": 300, "ignore_eos": True, "speculation": {"mode": "off"}}
"""A completion that takes long where steps are slow."""


@contextlib.contextmanager
def slow_steps() -> Iterator[None]:
    """Every step takes so long at least: hundreds of tokens, those of a request without draft tokens, take far longer
    than some requests to the server, on machines of any speed. What is left of them then comes as fast as ever.
    """
    schedule = Scheduler.schedule

    def slow(scheduler: Scheduler) -> StepPlan | None:
        time.sleep(STEP_S)
        return schedule(scheduler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "schedule", slow)
        yield


def generated(server: Any) -> int:
    return int(server.service.engine.stats.generation_tokens)


def wait_for_tokens(server: Any, since: int, count: int) -> None:
    """``since``: what was generated before anything was asked for, which may be done soon."""
    server.wait_until(lambda: generated(server) >= since + count)


def stopped_engine(server: Any, before: int) -> psutil.Process:
    """The engine that takes the place of the one with that number, which it does not before it is told to go on."""

    def find() -> psutil.Process | None:
        with contextlib.suppress(ValueError, psutil.Error):  # not there, or not what it will be
            found: psutil.Process = server.engine
            return found if found.pid != before else None
        return None

    engine: psutil.Process = server.wait_until(find)
    engine.suspend()
    return engine
