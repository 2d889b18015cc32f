"""Servers that a command starts for itself, and ends whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from slipstream.clients.aio import AsyncClient
from slipstream.clients.errors import ClientError

STOP_SECONDS = 20.0
STDERR = 2


@asynccontextmanager
async def running(
    name: str,
    command: Sequence[str],
    port: int,
    environment: Mapping[str, str] | None = None,
    *,
    ready_timeout: float = 300.0,
    log: Path | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A server on a local port that takes requests; ended with all its processes when the block is left.

    What it prints goes to the end of ``log``, or to this process's stderr. Raises ClientError if it ends before it is
    ready or never gets ready.
    """
    if _taken(port):
        raise ClientError(f"port {port} is taken: stop what listens there or choose another --port")
    file = log.open("ab") if log else None
    try:
        # A session of its own: a Ctrl-C in the terminal reaches only us, and one signal reaches all its processes.
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=file or STDERR, stderr=file, start_new_session=True
        )
    finally:
        if file:
            file.close()
    try:
        await _wait_ready(process, name, port, ready_timeout)
        yield process
    finally:
        await _stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def _wait_ready(process: asyncio.subprocess.Process, name: str, port: int, timeout: float) -> None:
    async with AsyncClient(f"http://127.0.0.1:{port}") as client:
        ready = asyncio.ensure_future(client.wait_ready(timeout))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise ClientError(f"{name} ended with status {process.returncode} before it was ready")
            await ready
        finally:
            for task in (ready, ended):
                task.cancel()
            await asyncio.gather(ready, ended, return_exceptions=True)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """SIGINT, then SIGKILL for what is left of its session."""
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
