"""What a stage is, and what it is given to work with and to tell what it has found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slipstream.server.gpu_check.report import Cell

Send = Callable[[tuple[Any, ...]], None]


class NotThere(Exception):  # noqa: N818  (says what a stage is, and is no error)
    """What a stage, or a part of one, would measure is not there; the message says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    out: Path
    budget_s: float
    dry_run: bool
    compare: tuple[str, ...]
    model: str | None
    only: tuple[str, ...]
    resume: bool = False
    """Go on where the report in ``out`` ends."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a stage that may fail without the others."""

    name: str
    run: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """A question. Its parts run in a process of their own, one after the other.

    ``parts`` may do what all of them need before it gives the first one; if that fails, the stage has failed.
    """

    name: str
    title: str
    parts: Callable[[Context], Iterable[Part]]
    least_s: float
    """It does not begin with less time left."""
    most_s: float
    """It begins no part after so long."""
    part_s: float = math.inf
    """A part that has taken so long hangs: it is ended, and the stage goes on with the next one."""


class Context:
    """Within the process of a stage: the device, what time there is, what others have found, and where to tell."""

    def __init__(self, options: Options, send: Send, deadline: float, kept: Mapping[str, float], scratch: Path) -> None:
        self.options = options
        self.dry_run = options.dry_run
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.kept = dict(kept)
        """Figures that have been kept, also by stages before this one."""
        self.scratch = scratch
        """An empty folder for everything that is written on the way."""
        self._send = send
        self._deadline = deadline

    @property
    def streams_s(self) -> float:
        """Streams that are measured are given so long for their prompts, and so long again for their steps."""
        return math.inf if self.dry_run else 15.0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the stage should be over."""
        return self._deadline - time.monotonic()

    def machine(self, facts: Mapping[str, Cell]) -> None:
        self._send(("machine", dict(facts)))

    def row(self, table: str, /, **cells: Cell) -> None:
        """One more row of a table; a column's name may have underscores for spaces."""
        self._send(("row", table, {name.replace("_", " "): value for name, value in cells.items()}))

    def check(self, name: str, passed: bool, found: str, wanted: str) -> None:
        """A result that must be right: the stage has failed if it is not."""
        self._send(("check", name, bool(passed), found, wanted))

    def target(self, name: str, found: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """A figure that is to be reached; judged on a GPU only."""
        assert (at_least is None) != (at_most is None)
        reached = found >= at_least if at_least is not None else found <= at_most  # type: ignore[operator]
        wanted = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
        self._send(("target", name, reached if self.on_gpu else None, f"{found:.3g}", wanted))

    def note(self, text: str) -> None:
        self._send(("note", text))

    def keep(self, name: str, value: float) -> None:
        """Tells later parts and stages a figure."""
        self.kept[name] = value
        self._send(("keep", name, value))


def streams_of(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"
