"""Work beside the steps: in order, one at a time, carried out only when polled, and never fatal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from slipstream.engine.background import Background


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


def poll_until(background: Background, condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        background.poll()
        time.sleep(0.001)


def test_jobs_are_prepared_beside_and_carried_out_in_turn(background: Background) -> None:
    seen: list[tuple[str, int, str]] = []

    def job(number: int) -> Callable[[], int]:
        def land() -> int:
            seen.append(("land", number, threading.current_thread().name))
            return number

        seen.append(("prepare", number, threading.current_thread().name.split("_")[0]))
        return land

    futures = [background.start(lambda number=number: job(number)) for number in range(4)]  # type: ignore[misc]
    assert background.has_work
    time.sleep(0.05)
    assert not any(future.done() for future in futures) and len(seen) <= 1
    poll_until(background, futures[-1].done)
    assert [future.result() for future in futures] == [0, 1, 2, 3]
    here = threading.current_thread().name
    assert seen == [
        entry for number in range(4) for entry in (("prepare", number, "background"), ("land", number, here))
    ]
    assert not background.has_work


def test_whatever_fails_is_told_and_the_next_job_runs(background: Background) -> None:
    def fail() -> Any:
        raise RuntimeError("in the thread")

    def fail_later() -> Callable[[], Any]:
        return fail

    first, second, third = background.start(fail), background.start(fail_later), background.start(lambda: lambda: 7)
    poll_until(background, third.done)
    assert isinstance(first.exception(), RuntimeError) and isinstance(second.exception(), RuntimeError)
    assert third.result() == 7


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_only_the_thread_has_the_lowest_priority(background: Background) -> None:
    before = os.sched_getscheduler(0)
    done = background.start(lambda: (lambda found: lambda: found)(os.sched_getscheduler(threading.get_native_id())))
    poll_until(background, done.done)
    assert done.result() == os.SCHED_IDLE
    assert os.sched_getscheduler(0) == before != os.SCHED_IDLE
