"""A Service of Kubernetes in the small: new connections go to what is ready, established ones are left alone.

``ServiceProxy`` is the Service, ``roll`` what happens to two pods in a rolling update.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

CHUNK_BYTES = 1 << 16
PROBE_TIMEOUT_S = 5


@dataclass(frozen=True)
class Address:
    host: str
    port: int


class ServiceProxy:
    """Forwards each new connection to the next backend that is ready. Belongs to one event loop.

    Like kube-proxy it knows bytes only: a connection stays with its backend until one of the two ends it, whatever
    becomes of that backend, and a connection for which no backend is there is reset.
    """

    def __init__(self, ready_path: str = "/ready", poll_s: float = 0.15) -> None:
        """``poll_s``: seconds between two looks at ``ready_path`` of a backend."""
        self.refused = 0
        """Connections that found no backend, or none that took them."""
        self._ready_path, self._poll_s = ready_path, poll_s
        self._probes: dict[Address, asyncio.Task[None]] = {}
        self._ready: set[Address] = set()
        self._turn = itertools.count()
        self._server: asyncio.Server | None = None
        self._forwarding: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> Address:
        assert self._server is not None, "the proxy does not run"
        return Address(*self._server.sockets[0].getsockname()[:2])

    @property
    def ready(self) -> frozenset[Address]:
        """Backends that new connections go to."""
        return frozenset(self._ready)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listens on a free port of the loopback interface. Connections that are left at the end are cut."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield
        finally:
            self._server.close()
            tasks = [*self._probes.values(), *self._forwarding]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def add(self, backend: Address) -> None:
        """Gets connections as soon as it says that it is ready."""
        assert backend not in self._probes, f"{backend} is there already"
        self._probes[backend] = asyncio.create_task(self._watch(backend))

    def remove(self, backend: Address) -> None:
        """Gets no new connections, ready or not."""
        self._probes.pop(backend).cancel()
        self._ready.discard(backend)

    async def until_ready(self, backend: Address, timeout_s: float) -> None:
        """Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while backend not in self._ready:
                await asyncio.sleep(0.02)

    async def _watch(self, backend: Address) -> None:
        while True:
            if await self._is_ready(backend):
                self._ready.add(backend)
            else:
                self._ready.discard(backend)
            await asyncio.sleep(self._poll_s)

    async def _is_ready(self, backend: Address) -> bool:
        request = f"GET {self._ready_path} HTTP/1.1\r\nhost: {backend.host}:{backend.port}\r\nconnection: close\r\n\r\n"
        writer = None
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(backend.host, backend.port)
                writer.write(request.encode())
                status = await reader.readline()
        except (OSError, TimeoutError):
            return False
        finally:
            if writer is not None:
                writer.close()
        return status.split()[1:2] == [b"200"]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._forwarding.add(task)
        task.add_done_callback(self._forwarding.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backends = sorted(self._ready, key=lambda backend: (backend.host, backend.port))
        try:
            if not backends:
                raise ConnectionRefusedError
            backend = backends[next(self._turn) % len(backends)]
            back_reader, back_writer = await asyncio.open_connection(backend.host, backend.port)
        except OSError:
            self.refused += 1
            writer.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(copy(reader, back_writer))
                group.create_task(copy(back_reader, writer))
        except* OSError:
            # One side was reset: so is the other.
            writer.transport.abort()
            back_writer.transport.abort()
        finally:
            writer.close()
            back_writer.close()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Up to the end of what one side sends, which the other side is told; the other direction goes on."""
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def roll(
    proxy: ServiceProxy,
    old: Address,
    new: Address,
    terminate_old: Callable[[], Awaitable[None]],
    *,
    start_timeout_s: float,
    pause_s: float,
    propagation_s: float = 0.5,
) -> None:
    """Replaces a pod by another one that has been started, in the order in which Kubernetes does it.

    When the new one is ready, the old one is told to end. Two things then happen side by side: its preStop hook pauses
    for ``pause_s``, after which ``terminate_old`` sends SIGTERM; and the news goes round, for ``propagation_s``, after
    which it gets no more connections.
    """
    proxy.add(new)
    await proxy.until_ready(new, start_timeout_s)

    async def terminate() -> None:
        await asyncio.sleep(pause_s)
        await terminate_old()

    async def leave() -> None:
        await asyncio.sleep(propagation_s)
        proxy.remove(old)

    async with asyncio.TaskGroup() as group:
        group.create_task(terminate())
        group.create_task(leave())
