"""Python processes that begin with what they need imported: forked from one that has done so, once for all of them.

Torch alone takes a second of a processor, which is more than most of what tests have such a process do.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from typing import IO, Self

PATIENCE_S = 600.0

FORKING = """
import gc, importlib, json, os, socket, sys
from contextlib import suppress
for name in sys.argv[2:]:
    importlib.import_module(name)
gc.freeze()
asked = socket.socket(fileno=int(sys.argv[1]))
while True:
    said, ends, *_ = socket.recv_fds(asked, 1 << 20, 4)
    if not said:
        break
    if os.fork():
        for end in ends:
            os.close(end)
        with suppress(ChildProcessError):  # those that waited for the processes before
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        continue
    asked.close()
    *streams, told = ends
    child = os.fork()
    if not child:
        os.close(told)
        for number, end in enumerate(streams):
            os.dup2(end, number)
            os.close(end)
        code, *sys.argv[1:] = json.loads(said)
        exec(code, {"__name__": "__main__"})
        sys.exit()
    for end in streams:
        os.close(end)
    os.write(told, f"{child}\\n".encode())
    os.write(told, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n".encode())
    os._exit(0)
"""


class Forked:
    """What subprocess.Popen is for others: text that is written and read line by line."""

    def __init__(self, streams: tuple[int, int, int], told: socket.socket) -> None:
        self.stdin: IO[str] = os.fdopen(streams[0], "w", 1)
        self.stdout: IO[str] = os.fdopen(streams[1])
        self.stderr: IO[str] = os.fdopen(streams[2])
        self._told = told.makefile("rb", 0)
        told.close()
        self.pid = int(self._told.readline())
        self._code: int | None = None

    def poll(self) -> int | None:
        """How it ended, as Popen says it; None while it runs."""
        if self._code is None and select.select([self._told], [], [], 0)[0]:
            self._end()
        return self._code

    def wait(self, timeout: float) -> int:
        """Raises TimeoutError."""
        if self._code is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            self._end()
        assert self._code is not None
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for its end; what it has not read or told is lost."""
        self.stdin.close()
        self.wait(PATIENCE_S)
        self.stdout.close()
        self.stderr.close()

    def _end(self) -> None:
        self._code = int(self._told.readline())
        self._told.close()


class Forks:
    """Runs code in processes that have imported these modules. Close it in the end."""

    def __init__(self, *modules: str) -> None:
        self._asked, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-c", FORKING, str(theirs.fileno()), *modules]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def start(self, code: str, *arguments: str) -> Forked:
        """``code`` finds the arguments where it would after ``python -c``."""
        told, telling = socket.socketpair()
        (their_in, our_in), (our_out, their_out), (our_err, their_err) = os.pipe(), os.pipe(), os.pipe()
        theirs = [their_in, their_out, their_err, telling.fileno()]
        socket.send_fds(self._asked, [json.dumps([code, *arguments]).encode()], theirs)
        telling.close()
        for end in theirs[:3]:
            os.close(end)
        return Forked((our_in, our_out, our_err), told)

    def close(self) -> None:
        self._asked.close()
        self._process.wait()
