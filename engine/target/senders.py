"""Who sends an update: whether it is there still, or has ended between two parts of one."""

from __future__ import annotations

import re
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slipstream.engine.background import done

Presence = bool | None
"""There, gone, or not known."""
ANSWER_S = 10.0
"""Who has not answered for so long is taken to be gone."""
PROC = Path("/proc")
SHARING = re.compile(rb"/torch_([0-9]{1,10})_")
"""In the name of each file or counter by which torch shares a tensor: the process that made it."""
BEFORE_TIMES = 19
"""Fields of /proc/PID/stat between the state of a process and the time at which it began."""


class Sender(Protocol):
    def is_there(self) -> Future[Presence]: ...


Senders = frozenset[Sender]


@dataclass(frozen=True, slots=True)
class Unknown:
    """Whoever writes files or sends bytes: nothing tells them apart from others who do."""

    def is_there(self) -> Future[Presence]:
        return done(None)


@dataclass(frozen=True, slots=True)
class Process:
    """One of this machine."""

    pid: int
    began: int
    """By the kernel's clock: another process may get the number."""

    def is_there(self) -> Future[Presence]:
        return done(_began(self.pid) == self.began)


UNKNOWN: Senders = frozenset({Unknown()})


def processes(pickled: bytes) -> Senders:
    """Those that share the tensors of such handles, as far as they can be seen from here."""
    found: set[Sender] = set()
    for pid in {int(each) for each in SHARING.findall(pickled)}:
        began = _began(pid)
        found.add(Unknown() if began is None else Process(pid, began))
    return frozenset(found) or UNKNOWN


def _began(pid: int) -> int | None:
    """When a process began that has not ended; None if there is none."""
    try:
        state, *fields = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return None if state in (b"Z", b"X") else int(fields[BEFORE_TIMES - 1])
    except (OSError, ValueError, IndexError):
        return None


class Roll:
    """Asks all senders of an update."""

    def __init__(self, senders: Senders) -> None:
        self._answers = [sender.is_there() for sender in senders]
        self._until = time.monotonic() + ANSWER_S
        self.told: Future[Presence] = Future()
        """There if all are, gone if one is."""

    def look(self) -> bool:
        """Whether all have answered, or have had time enough; it is told then."""
        if not all(answer.done() for answer in self._answers) and time.monotonic() < self._until:
            return False
        found = [answer.result() if answer.done() else False for answer in self._answers]
        self.told.set_result(False if False in found else None if None in found else True)
        return True
