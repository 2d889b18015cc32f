"""What the processes of a local server use: processor time and memory of a process and all its descendants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic, sleep
from urllib.parse import urlsplit

import psutil

STOP_SECONDS = 5.0
LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


@dataclass(frozen=True, slots=True)
class ProcessTree:
    pid: int

    def __post_init__(self) -> None:
        if not psutil.pid_exists(self.pid):
            raise ValueError(f"there is no process {self.pid}")

    def processes(self) -> Iterator[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            yield root
            yield from root.children(recursive=True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The processes stand still, whatever they do, until the block is left."""
        processes = list(self.processes())
        try:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            for process in processes:
                _wait_until_stopped(process)
            yield
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def cpu_seconds(self) -> float:
        """Processor time used so far, user and system."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def resident_bytes(self) -> dict[str, int]:
        """Resident memory by process; pages shared between them count once per process."""
        found: dict[str, int] = {}
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                found[_called(process)] = process.memory_info().rss
        return found


def _called(process: psutil.Process) -> str:
    """The module that a Python process runs, or else its program, and its number."""
    with suppress(psutil.Error):
        named = [word for word in process.cmdline() if word.startswith("slipstream.")]
        return f"{named[-1] if named else process.name()} {process.pid}"
    return str(process.pid)


def _wait_until_stopped(process: psutil.Process) -> None:
    """The signal has been sent; one that computes stops when the kernel looks at it next."""
    deadline = monotonic() + STOP_SECONDS
    with suppress(psutil.NoSuchProcess):
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE) and monotonic() < deadline:
            sleep(0.001)


def serving(url: str) -> ProcessTree | None:
    """The processes that listen on a local URL; None if it is remote or belongs to someone else."""
    parts = urlsplit(url)
    if parts.hostname not in LOCAL:
        return None
    port = parts.port or 80
    with suppress(psutil.AccessDenied):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return ProcessTree(connection.pid)
    return None
