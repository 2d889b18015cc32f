"""Child processes that never outlive the one that started them, however it ends and however busy the machine is.

``command`` gives the command line that runs a module as such a child:
``python -m slipstream.engine.child PARENT PRIORITY MODULE ARGUMENTS``. Before it imports anything of the module, the
child asks the kernel to kill it when its parent ends (Linux; elsewhere it has to notice by itself), and only then gives
up its priority. The signal comes when the *thread* that started the child ends, so start children in the thread that
lives longest.

``EarlyChild`` is one that is started before anybody knows its arguments, and imports its module meanwhile.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slipstream.engine.memory import trim

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Mapping

Priority = Literal["normal", "lowest"]
LOWEST_NICE = 19
"""Next to nothing of a core where others want all of it."""
PR_SET_PDEATHSIG = 1
SYS_PROCESS_MRELEASE = 448
HASTEN_MS = 100
WHEN_TOLD = "when-told"
"""In place of arguments: they come on the standard input, as a list in JSON, when the module is imported."""
"""The kernel lets unprivileged users change the weight of a session ten times a second, all of them together."""


def command(module: str, *arguments: str, priority: Priority = "normal") -> tuple[str, ...]:
    """The command line that runs a module as a child of this process.

    ``lowest``: it gets only what nobody else wants of the processor, which is next to nothing on a machine that is
    always busy. Start it in a session of its own.
    """
    return (sys.executable, "-P", "-m", __name__, str(os.getpid()), priority, module, *arguments)


class EarlyChild:
    """A child in a session of its own that is told its arguments later; till then it imports what its module needs."""

    def __init__(self, module: str, environment: Mapping[str, str], descriptor: int) -> None:
        """``descriptor``, of a socket or pipe, is handed on under the same number."""
        import subprocess  # which children themselves need not wait for

        self.process = subprocess.Popen(
            command(module, WHEN_TOLD),
            env=environment,
            stdin=subprocess.PIPE,
            pass_fds=(descriptor,),
            start_new_session=True,
        )

    def tell(self, *arguments: str) -> None:
        """Has the module run. Nothing happens if the child has ended, as whoever waits for it sees."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(json.dumps(arguments).encode())


def step_back(pid: int) -> None:
    """Gives a process that was just started the lowest priority, as far as the system lets us.

    Linux divides the processor between sessions first, and then between the threads of each (autogroup, see sched(7)):
    a process that got a session of its own takes half of it from everybody else together, in whatever scheduling class
    its threads are. So the session steps back, too. Where control groups divide the processor, the class is enough.
    """
    with suppress(OSError):
        if sys.platform == "linux":
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
            _weigh_session(pid, LOWEST_NICE)
        else:
            os.setpriority(os.PRIO_PROCESS, pid, LOWEST_NICE)


def keep_for_good() -> None:
    """What exists by now lives as long as the process; collections of garbage need not walk it."""
    trim()
    gc.freeze()


async def hasten(process: Process) -> None:
    """Waits until a process of the lowest priority that was told to end, or killed, has ended, as fast as others would.

    Also a killed process needs the processor to end: beside eight busy ones, the lowest took half a minute.
    """
    import asyncio  # which children that start need not wait for

    while process.returncode is None:
        _step_forward(process.pid)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), HASTEN_MS / 1000)


def _step_forward(pid: int) -> None:
    with suppress(OSError):
        _weigh_session(pid, 0)


def _weigh_session(pid: int, nice: int) -> None:
    if os.getsid(pid) == pid:  # else it would be the session of whoever started the server
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        sys.exit(1)


def _fork_reaper(parent: int) -> None:
    """Starts a process of normal priority that only waits, and hastens this one's end when the parent has ended.

    The kernel kills this process then, but nobody is left to give it the processor.
    """
    if not hasattr(os, "pidfd_open"):
        return
    child = os.getpid()
    if os.fork() == 0:
        try:
            _reap(parent, child)
        finally:
            os._exit(0)


def _reap(parent: int, child: int) -> None:
    os.setsid()
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # whoever reads the child's output waits until nobody holds it
    waiting, ended = select.poll(), select.poll()
    child_descriptor = os.pidfd_open(child)
    for poll in (waiting, ended):
        poll.register(child_descriptor, select.POLLIN)
    with suppress(ProcessLookupError):
        waiting.register(os.pidfd_open(parent), select.POLLIN)
        waiting.poll()
    while not ended.poll(HASTEN_MS):
        _step_forward(child)
        ctypes.CDLL(None).syscall(SYS_PROCESS_MRELEASE, child_descriptor, 0)  # its memory is freed here and now


def main(parent: str, priority: Priority, module: str, *arguments: str) -> None:
    _die_with(int(parent))
    if priority != "normal":
        _fork_reaper(int(parent))
        step_back(os.getpid())
    if arguments == (WHEN_TOLD,):
        gc.disable()  # there is little garbage, and collections walk all modules again and again: 0.2 s with torch
        importlib.import_module(module)
        gc.freeze()
        gc.enable()
        told = sys.stdin.read()
        if not told:
            return  # whoever started it has changed its mind
        arguments = tuple(json.loads(told))
        del sys.modules[module]  # it is run now, with all that it has imported
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
