"""Work beside the steps: in order, one at a time, carried out only when polled, and never fatal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from slipstream.engine.background import SHARE_SECONDS, Background, breathe

PATIENCE_S = 300.0
"""The thread gets what nobody else wants of the processor, which is next to nothing on a busy machine."""


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def poll_until(background: Background, condition: Callable[[], Any]) -> None:
    def polled() -> Any:
        background.poll()
        return condition()

    until(polled)


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


def spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_without_a_job_there_is_no_thread(background: Background) -> None:
    """One of the lowest priority may take seconds to begin and to end, and an engine would wait for it."""
    before = threading.active_count()
    assert not background.has_work
    poll_until(background, background.start(lambda: lambda: None).done)
    assert threading.active_count() == before + 1


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_only_the_thread_has_the_lowest_priority(background: Background) -> None:
    before = os.sched_getscheduler(0)
    done = background.start(lambda: (lambda found: lambda: found)(os.sched_getscheduler(threading.get_native_id())))
    poll_until(background, done.done)
    assert done.result() == os.SCHED_IDLE
    assert os.sched_getscheduler(0) == before != os.SCHED_IDLE


def test_long_work_takes_its_share_of_a_step_and_waits_for_the_next(background: Background) -> None:
    pieces: list[int] = []
    has_steps = threading.Event()

    def prepare() -> Callable[[], None]:
        has_steps.wait()
        for number in range(6):
            spin(2 * SHARE_SECONDS)
            pieces.append(number)
            breathe()
        return lambda: None

    done = background.start(prepare)
    for step in range(1, 6):
        background.poll(is_busy=True)
        has_steps.set()
        until(lambda least=step: len(pieces) >= least)  # type: ignore[misc]
        time.sleep(0.05)  # however long a step is
        assert len(pieces) == step
    assert not done.done()
    background.poll()  # nothing is held up any more
    poll_until(background, done.done)
    assert len(pieces) == 6


def test_a_server_that_stops_does_not_wait_for_steps(background: Background) -> None:
    def prepare() -> Callable[[], None]:
        for _ in range(5):
            spin(2 * SHARE_SECONDS)
            breathe()
        return lambda: None

    background.start(prepare)
    background.poll(is_busy=True)
    time.sleep(0.05)
    background.close()


def test_the_thread_computes_alone(background: Background) -> None:
    before = torch.get_num_threads()
    done = background.start(lambda: (lambda found: lambda: found)(torch.get_num_threads()))
    poll_until(background, done.done)
    assert done.result() == 1
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == torch.get_num_threads() == before
