"""What the worker is told, over a real pipe."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from slipstream.drafter.training import control as module
from slipstream.drafter.training.control import Control, Mode, Report, ServerGoneError, StandBy
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example
from slipstream.drafter.training.trainer import Trainer, TrainOptions

MakeHead, MakeExample = Callable[..., TrainableHead], Callable[..., Example]

SOON = 300.0
"""More than anything takes here, on a slow and busy machine too."""


class Server:
    """The other end of the line."""

    def __init__(self, mode: Mode) -> None:
        reads, writes = os.pipe()
        self.lines = os.fdopen(writes, "w", buffering=1)
        self.reports: list[Report] = []
        self._reader = os.fdopen(reads)
        self.control = Control(mode, self._reader, self.reports.append)

    def say(self, kind: str, **fields: Any) -> None:
        self.lines.write(json.dumps({"type": kind, **fields}) + "\n")

    def load(self, running: int) -> None:
        """Returns when the worker knows."""
        self.say("load", running=running)
        until(lambda: self.control._running == running)

    def close(self) -> None:
        self.lines.close()
        until(lambda: self.control._stopped)
        self._reader.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Waiting:
    """``wait`` in a thread: whether it returned, and how."""

    def __init__(self, control: Control) -> None:
        self.asked = threading.Event()
        self.seconds = -1.0
        self._control = control
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self) -> None:
        self.seconds = self._control.wait(self.asked.set)

    def returned(self, within: float = SOON) -> bool:
        self.thread.join(within)
        return not self.thread.is_alive()


@pytest.fixture
def connect() -> Iterator[Callable[[Mode], Server]]:
    servers: list[Server] = []

    def make(mode: Mode) -> Server:
        servers.append(Server(mode))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


Connect = Callable[[Mode], Server]


def test_idle_waits_until_nothing_has_run_for_a_while(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALM_SECONDS", 0.3)
    server = connect("idle")
    assert server.control.wait() < SOON
    server.load(2)
    waiting = Waiting(server.control)
    assert waiting.asked.wait(SOON)
    began = time.monotonic()
    server.load(0)
    assert waiting.returned()
    assert time.monotonic() - began >= 0.29
    assert waiting.seconds >= 0.29


def test_a_request_in_the_calm_time_starts_it_again(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALM_SECONDS", SOON)
    server = connect("idle")
    server.load(1)
    server.load(0)
    waiting = Waiting(server.control)
    server.load(1)
    server.control._busy_until = time.monotonic()  # the time is over
    server.load(2)  # has it look again
    assert not waiting.returned(0.1)
    monkeypatch.setattr(module, "CALM_SECONDS", 0.1)
    server.load(0)
    assert waiting.returned()


def test_always_goes_on_under_load_but_not_when_paused(connect: Connect) -> None:
    server = connect("always")
    server.load(32)
    assert Waiting(server.control).returned()
    server.say("pause", paused=True)
    until(lambda: server.control._paused)
    waiting = Waiting(server.control)
    assert waiting.asked.wait(SOON)
    assert not waiting.returned(0.1)
    server.say("pause", paused=False)
    assert waiting.returned()


@pytest.mark.parametrize("mode", ["idle", "always"])
def test_the_end_of_the_line_ends_every_wait(connect: Connect, mode: Mode) -> None:
    server = connect(mode)
    server.say("pause", paused=True)
    until(lambda: server.control._paused)
    waiting = Waiting(server.control)
    assert waiting.asked.wait(SOON)
    server.lines.close()
    assert waiting.returned()
    with pytest.raises(ServerGoneError):
        server.control.sleep(60)
    with pytest.raises(ServerGoneError):
        server.control.check()


@pytest.mark.parametrize("backward", [False, True])
def test_training_stands_by_in_the_middle_of_a_step(
    connect: Connect, make_head: MakeHead, make_example: MakeExample, backward: bool
) -> None:
    server = connect("idle")
    server.control.check()
    asked = threading.Event()
    stand_by = StandBy(server.control, asked.set)
    head, places = make_head(), []

    def between() -> None:
        places.append(torch._C._current_graph_task_id() >= 0)  # whether it is in the backward pass
        if places.count(backward) == 3 and places[-1] == backward:
            server.load(1)
        stand_by.wait()

    head.between = between
    trainer = Trainer(head, TrainOptions())
    before = head.weights["fc.weight"].clone()
    thread = threading.Thread(target=trainer.learn, args=([[make_example(40)]],), daemon=True)
    thread.start()
    assert asked.wait(SOON), "what followed did not wait"
    thread.join(0.1)
    assert thread.is_alive() and torch.equal(head.weights["fc.weight"], before)
    server.load(0)
    thread.join(SOON)
    assert not thread.is_alive()
    assert not torch.equal(head.weights["fc.weight"], before)
    assert stand_by.seconds >= 0.1, "a thread waited for which all others do"


def test_what_threads_wait_at_the_same_time_counts_once_and_whichever_waits(connect: Connect) -> None:
    server = connect("idle")
    asked = [threading.Event(), threading.Event()]
    waiting = iter(asked)
    stand_by = StandBy(server.control, lambda: next(waiting).set())
    server.load(1)
    threads = [threading.Thread(target=stand_by.wait, daemon=True) for _ in asked]
    began = time.monotonic()
    for thread, event in zip(threads, asked, strict=True):
        thread.start()
        assert event.wait(SOON)
    threads[0].join(0.2)
    server.load(0)
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert 0.2 <= stand_by.seconds <= time.monotonic() - began


def test_a_step_is_finished_when_the_server_goes(connect: Connect) -> None:
    server = connect("idle")
    stand_by = StandBy(server.control, server.lines.close)
    with stand_by:
        server.load(1)
        stand_by.wait()
    assert server.lines.closed and stand_by.seconds > 0, "it did not wait"
    with pytest.raises(ServerGoneError), stand_by:
        pass


def test_a_round_that_is_asked_for_ends_sleep_and_is_told_once(connect: Connect) -> None:
    server = connect("idle")
    server.say("train", reason="drift")
    began = time.monotonic()
    server.control.sleep(60)
    assert time.monotonic() - began < SOON
    assert server.control.take_due() == "drift"
    assert server.control.take_due() == ""
    server.say("train")
    server.control.sleep(60)
    assert server.control.take_due() == "asked for"


def test_told_to_finish_nothing_sleeps(connect: Connect) -> None:
    server = connect("idle")
    server.say("finish")
    began = time.monotonic()
    server.control.sleep(60)
    assert server.control.finishing and time.monotonic() - began < SOON


def test_what_steps_cost_is_known_once_it_is_told(connect: Connect) -> None:
    server = connect("idle")
    assert server.control.speed is None
    server.say("machine", step_seconds={"1": 0.01, "8": 0.02}, draft_seconds={"1": [0.001, 0.0015]}, streams={"1": 1.0})
    until(lambda: server.control.speed is not None)
    assert server.control.speed is not None and server.control.speed.step_seconds == {1: 0.01, 8: 0.02}
    server.say("machine", step_seconds={}, draft_seconds={"1": [0.001, 0.0015]}, streams={})
    until(lambda: server.control.speed is None)


def test_reports_are_lines_of_json(capfd: pytest.CaptureFixture[str]) -> None:
    module.print_line(Report("published", "tenant:a", version=3, gate={"accept_length": 1.5}))
    assert json.loads(capfd.readouterr().out) == {
        "state": "published",
        "route": "tenant:a",
        "version": 3,
        "gate": {"accept_length": 1.5},
    }
