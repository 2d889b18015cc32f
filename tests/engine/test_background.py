"""Work beside the steps: in order, a share after every step, carried out only when polled, and never fatal."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.background import DOUBLING_S, FIRST_SHARE, FULL_AFTER, Background, breathe
from slipstream.engine.errors import SupersededError

PATIENCE_S = 300.0


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


@pytest.mark.parametrize("fails", ["never", "prepared", "landing"])
def test_nothing_of_a_job_is_kept_when_it_is_over(background: Background, fails: str) -> None:
    """Weights of an update that was given up: they would be there until the next job, or Python's next collection."""

    class Weights: ...

    def start() -> tuple[Future[Any], ReferenceType[Weights]]:
        weights = Weights()

        def land() -> str:
            if fails == "landing":
                raise ValueError(weights)
            return str(weights)

        def prepare() -> Callable[[], str]:
            if fails == "prepared":
                raise ValueError(weights)
            return land

        return background.start(prepare), ref(weights)

    gc.disable()
    try:
        told, weights = start()
        poll_until(background, lambda: not background.has_work)  # told.done would be kept by the frames of an error
        assert (told.exception() is None) == (fails == "never")
        del told
        until(lambda: weights() is None)
    finally:
        gc.enable()


def test_without_a_job_there_is_no_thread(background: Background) -> None:
    assert not background.has_work and background._thread is None
    poll_until(background, background.start(lambda: lambda: None).done)
    assert background._thread is not None and background._thread.is_alive()


def test_work_that_waits_for_a_step_keeps_no_process_from_ending() -> None:
    """An engine that ends otherwise than by ``close`` has no more steps."""
    script = """
import subprocess
import sys
from slipstream.engine.background import Background, breathe
def prepare():
    while True:
        breathe()
background = Background()
background.poll(is_busy=True)
background.start(prepare)
background.poll(is_busy=True)
print(background.has_work)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], timeout=PATIENCE_S, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


class Played(Background):
    """Time passes only where a test says so, and a step waits for the thread however slow the machine is."""

    def __init__(self) -> None:
        self.now = 100.0
        super().__init__(clock=lambda: self.now)

    def _wait(self, seconds: float) -> None:
        assert self._turn.wait_for(lambda: not self._has_turn, PATIENCE_S)

    def step(self, seconds: float) -> None:
        """What the loop of the steps does."""
        self.poll(is_busy=True)
        self.now += seconds

    def pieces(self, count: int, seconds: float, done: list[float]) -> Callable[[], Callable[[], int]]:
        """Work that takes so long, and notes when each piece of it was done."""

        def prepare() -> Callable[[], int]:
            for _ in range(count):
                self.now += seconds
                done.append(self.now)
                breathe()
            return lambda: len(done)

        return prepare


@pytest.fixture
def played() -> Iterator[Played]:
    made = Played()
    yield made
    made.close()


@given(
    step=st.floats(0.001, 3.0),
    piece=st.floats(1e-4, 1e-3),
    work=st.floats(0.001, 3.0),
)
@settings(max_examples=30)
def test_beside_steps_work_gets_its_share_in_slices_and_no_more(step: float, piece: float, work: float) -> None:
    played = Played()
    pieces: list[float] = []
    count = math.ceil(work / piece)
    played.step(step)
    done = played.start(played.pieces(count, piece, pieces))
    began, steps = played.now, 0
    while not done.done():
        before, now = len(pieces), played.now
        played.step(step)
        share = min(FIRST_SHARE * 2 ** ((now - began) / DOUBLING_S), 1.0)
        taken = played.now - step - now
        assert taken <= share * step + piece + 1e-9, "a slice is bounded by what the step took"
        assert taken >= min(share * step, (count - before) * piece) - 1e-9, "and it is had whole"
        steps += 1
    # All the time until a slice is as long as a step, then as much again as the work takes, and what does not divide.
    assert played.now - began <= FULL_AFTER * DOUBLING_S + 2 * work + 2 * (step + piece)
    assert done.result() == count
    played.close()


def test_work_stands_still_while_a_step_runs(played: Played) -> None:
    pieces: list[float] = []
    played.step(1.0)
    done = played.start(played.pieces(10_000, FIRST_SHARE / 10, pieces))
    time.sleep(0.05)
    assert not pieces, "it waits for a turn of its own"
    for _ in range(3):
        played.step(1.0)
        seen = len(pieces)
        time.sleep(0.02)
        assert len(pieces) == seen > 0
    assert not done.done()
    played.poll()  # nothing is held up any more
    poll_until(played, done.done)
    assert len(pieces) == 10_000


def test_the_latest_decision_of_a_kind_counts(played: Played) -> None:
    pieces: dict[str, list[float]] = {name: [] for name in ("first", "second", "other")}
    played.step(1.0)
    first = played.start(played.pieces(10_000, FIRST_SHARE / 5, pieces["first"]), "route")
    other = played.start(played.pieces(2, FIRST_SHARE / 5, pieces["other"]), "another route")
    played.step(1.0)
    assert pieces["first"] and not first.done()
    seen = len(pieces["first"])
    second = played.start(played.pieces(2, FIRST_SHARE / 5, pieces["second"]), "route")
    assert isinstance(first.exception(), SupersededError) and "'route'" in str(first.exception())
    while not second.done():
        played.step(1.0)
    assert other.result() == second.result() == 2
    assert len(pieces["first"]) == seen, "nobody works for what nobody wants any more"
    assert not played.supersede("route") and not played.has_work


def test_decisions_that_keep_coming_do_not_keep_each_other_from_taking_effect(played: Played) -> None:
    """Each of them would take three steps, and there is another one every two steps."""
    landed = 0
    played.step(0.1)
    for _ in range(100):
        done = played.start(played.pieces(3, FIRST_SHARE / 10, []), "route")
        for _ in range(2):
            played.step(0.1)
        landed += done.done() and done.exception() is None
    assert landed >= 10


def test_a_server_that_stops_does_not_wait_for_steps(background: Background) -> None:
    began = threading.Event()

    def prepare() -> Callable[[], None]:
        began.set()
        while True:
            breathe()

    background.start(prepare)
    began.wait()
    background.poll(is_busy=True)
    background.close()


def test_the_thread_computes_alone(background: Background) -> None:
    before = torch.get_num_threads()
    done = background.start(lambda: (lambda found: lambda: found)(torch.get_num_threads()))
    poll_until(background, done.done)
    assert done.result() == 1
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == torch.get_num_threads() == before
