"""What the server tells its training worker, line by line on standard input, and what it hears back."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Literal

import msgspec

from slipstream.drafter.training.gate import Speed

CALM_SECONDS = 0.5
"""Time without requests before training goes on in idle mode: between two requests of a chat it would only
be in the way."""
Mode = Literal["idle", "always"]


class Load(msgspec.Struct, frozen=True, tag="load"):
    """How many requests run now."""

    running: int


class Machine(msgspec.Struct, frozen=True, tag="machine"):
    """What steps cost where it serves; see gate.Speed."""

    step_seconds: dict[int, float]
    draft_seconds: dict[int, list[float]]
    streams: dict[int, float]


class Train(msgspec.Struct, frozen=True, tag="train"):
    """Traffic has drifted, or somebody asks for it: a round is due even if little is new."""

    reason: str = ""


class Judge(msgspec.Struct, frozen=True, tag="judge"):
    """The round under way ends here, and what came of it is judged; nothing where none is."""


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """Training pauses or goes on until told otherwise, whatever the load: a trainer wants the machine for itself."""

    paused: bool


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """The round under way ends here, what came of it is judged, and the worker ends."""


Message = Load | Machine | Train | Judge | Pause | Finish


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line to the server."""

    state: Literal["waiting", "training", "gating", "paused", "published", "refused", "failed"]
    route: str = ""
    step: int = 0
    loss: float = 0.0
    tokens: int = 0
    """Positions learned since the worker's start, on all routes."""
    tokens_per_second: float = 0.0
    """Positions learned per second of training, pauses not counted."""
    arithmetic: str = ""
    """What it computes in and how fast this machine is at that, in words."""
    progress: float = 0.0
    """How much of the round is done, 0 to 1."""
    passed_over: int = 0
    """Texts that cannot be learned from, because the target's weights have changed since."""
    version: int = 0
    foreign: bool = False
    """The version that was judged was not trained here."""
    gate: dict[str, float] = {}
    message: str = ""


class ServerGoneError(Exception):
    """The server has closed the line: it ended, in whatever way."""


def print_line(report: Report) -> None:
    """Writes a report to standard output, for the server."""
    try:
        print(msgspec.json.encode(report).decode(), flush=True)
    except BrokenPipeError:
        raise ServerGoneError from None


class Control:
    """Reads in a thread, so that a lost server is noticed in the middle of a step."""

    def __init__(
        self, mode: Mode, lines: Iterable[str] = sys.stdin, report: Callable[[Report], None] = print_line
    ) -> None:
        """``lines``: messages; where they end, the server has ended."""
        self.mode = mode
        self.report = report
        self._running = 0
        self._busy_until = 0.0
        self._paused = False
        self._stopped = False
        self._due = ""
        self.finishing = False
        """Told to finish."""
        self.round_ends = False
        """Told to end the round under way; whoever begins one takes it back."""
        self.speed: Speed | None = None
        self._changed = threading.Condition()
        self._decoder = msgspec.json.Decoder(Message)
        threading.Thread(target=self._listen, args=(lines,), daemon=True, name="control").start()

    def wait(self, waiting: Callable[[], None] = lambda: None) -> float:
        """Returns once training may go on, or the server has gone; how many seconds that took.

        Calls ``waiting`` if it may not go on now.
        """
        if self._stopped or self._allowed():  # without the lock: threads ask often
            return 0.0
        with self._changed:
            began = time.monotonic()
            with suppress(ServerGoneError):
                waiting()
            while not self._stopped and not self._allowed():
                calm = not (self._running or self._paused)
                self._changed.wait(max(self._busy_until - time.monotonic(), 0) if calm else None)
            return time.monotonic() - began

    def check(self) -> None:
        """Raises ServerGoneError if it has."""
        if self._stopped:
            raise ServerGoneError

    def sleep(self, seconds: float) -> None:
        """Raises ServerGoneError; returns early when a round is due, or when told to finish."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self.finishing or bool(self._due), seconds)
            if self._stopped:
                raise ServerGoneError

    def take_due(self) -> str:
        """Why a round was asked for since the last call; empty if it was not."""
        with self._changed:
            due, self._due = self._due, ""
        return due

    def _allowed(self) -> bool:
        if self._paused:
            return False
        return self.mode == "always" or not (self._running or time.monotonic() < self._busy_until)

    def _listen(self, lines: Iterable[str]) -> None:
        try:
            for line in lines:
                message = self._decoder.decode(line)
                with self._changed:
                    self._take(message)
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def _take(self, message: Message) -> None:
        match message:
            case Load(running):
                if self._running and not running:
                    self._busy_until = time.monotonic() + CALM_SECONDS
                self._running = running
            case Machine(step_seconds, draft_seconds, streams):
                self.speed = Speed(step_seconds, draft_seconds, streams) if step_seconds and streams else None
            case Train(reason):
                self._due = reason or "asked for"
            case Judge():
                self.round_ends = True
            case Pause(paused):
                self._paused = paused
            case Finish():
                self.finishing = True


class StandBy:
    """Entering it waits until training may go on; what computes for long inside calls ``wait`` in between.

    Entering raises ServerGoneError if the server has gone; inside, what was begun is finished then.

    A part of a training step takes half a second where nobody else computes, and ten times as long in the gaps that a
    busy server leaves: too long to be stopped only between parts. A GPU is given work faster than it does it, and what
    was given cannot be taken back: so in idle mode it gets no more before it has done it.
    """

    def __init__(self, control: Control, waiting: Callable[[], None], settle: Callable[[], None] | None = None) -> None:
        """``waiting`` is called whenever it begins to wait; ``settle`` returns when the GPU has nothing to do."""
        self._control = control
        self._waiting = waiting
        self._settle = settle
        self._lock = threading.Lock()
        self._until = 0.0
        self.seconds = 0.0
        """In which some thread has waited so far: then those that have not yet come to wait do so for this one."""

    def __enter__(self) -> StandBy:
        self.wait()
        self._control.check()
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def wait(self) -> None:
        """Until training may go on, or the server has gone; threads may do so at once."""
        if self._settle is not None and self._control.mode == "idle":
            self._settle()
        if waited := self._control.wait(self._waiting):
            with self._lock:
                now = time.monotonic()
                self.seconds += now - max(now - waited, self._until)
                self._until = now
