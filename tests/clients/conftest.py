"""A server on a socket that answers with exactly the bytes a test asks for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

PAUSE = object()
"""In a reply: wait until the test calls ``resume``."""


@dataclass
class Wire:
    """Replies are taken in order, one per request; a piece is sent as one write."""

    replies: list[list] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    connections: int = 0
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client closed a connection while its reply was not complete."""
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await self._head(reader):
                line, *lines = head.decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.requests.append((line, headers, body))
                for piece in self.replies.pop(0):
                    if piece is PAUSE:
                        await self._paused(reader)
                    elif piece is None:
                        return
                    else:
                        writer.write(piece)
                        await writer.drain()
                        await asyncio.sleep(0.002)  # so that the client reads the pieces apart
        except ConnectionError:
            self.lost.set()
        finally:
            writer.close()

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return (await reader.readuntil(b"\r\n\r\n")).rstrip()
        except asyncio.IncompleteReadError:
            return b""

    async def _paused(self, reader: asyncio.StreamReader) -> None:
        closed = asyncio.ensure_future(reader.read(1))
        resumed = asyncio.ensure_future(self.resume.wait())
        await asyncio.wait((closed, resumed), return_when=asyncio.FIRST_COMPLETED)
        resumed.cancel()
        if closed.done():
            raise ConnectionResetError
        closed.cancel()


def response(body: bytes, status: str = "200 OK", kind: str = "application/json", **headers: str) -> list:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ["\r\n".join(lines).encode() + b"\r\n\r\n" + body]


def stream(*pieces: object, end: bool = True) -> list:
    """A chunked event stream; with ``end`` false the connection breaks after the pieces."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    coded = [piece if piece is PAUSE else b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    return [head, *coded, b"0\r\n\r\n" if end else None]


@asynccontextmanager
async def running(wire: Wire) -> AsyncIterator[Wire]:
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    wire.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield wire
    finally:
        wire.resume.set()
        server.close()


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with running(Wire()) as wire:
        yield wire


@pytest.fixture
def reply() -> object:
    class Reply:
        PAUSE = PAUSE
        response = staticmethod(response)
        stream = staticmethod(stream)

    return Reply
