"""Processes that help the server and must not slow it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

LOWEST_NICE = 19


def step_back(pid: int) -> None:
    """Gives a process that was just started only what nobody else wants of the processor, as far as the system lets us.

    Linux divides the processor between sessions first, and then between the threads of each (autogroup, see sched(7)):
    a process that got a session of its own takes half of it from everybody else together, in whatever scheduling class
    its threads are. So the session steps back, too. Where control groups divide the processor, the class is enough.
    """
    with suppress(OSError):
        if sys.platform == "linux":
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
            if os.getsid(pid) == pid:  # else it would be the session of whoever started the server
                Path(f"/proc/{pid}/autogroup").write_text(str(LOWEST_NICE))
        else:
            os.setpriority(os.PRIO_PROCESS, pid, LOWEST_NICE)
