"""Frames over a socket pair between the API process and the engine process: four bytes of length, then msgpack.

The API process reads in its event loop; the engine polls between steps and blocks while it is idle. Neither needs a
thread for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from typing import cast

import msgspec

from slipstream.engine.messages import FromEngine, ToEngine

LENGTH_BYTES = 4
READ_BYTES = 1 << 20


class Frames:
    """Cuts a byte stream into frames, in time that grows with the bytes, however large frames and small parts are."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that ``data`` completes."""
        self._buffer += data
        begin, size = 0, len(self._buffer)
        while size - begin >= LENGTH_BYTES:
            first = begin + LENGTH_BYTES
            end = first + int.from_bytes(self._buffer[begin:first], "little")
            if end > size:
                break
            begin = end
            yield bytes(memoryview(self._buffer)[first:end])
        del self._buffer[:begin]


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(LENGTH_BYTES, "little") + payload


class Undecodable(msgspec.Struct, frozen=True):
    """A frame that is none of the messages; as much as could be read of it."""

    error: str
    tag: str = ""
    message_id: int = 0
    """The second field, by which requests and calls are answered."""


class EngineChannel:
    """The engine's end: blocking writes, polled reads."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._frames = Frames()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._deaf = False

    def wake(self) -> None:
        """Ends the wait of ``receive`` for good, from another thread or a signal handler: nothing arrives any more."""
        self._deaf = True
        with contextlib.suppress(OSError):  # of a connection that is lost
            self._socket.shutdown(socket.SHUT_RD)

    def send(self, message: FromEngine) -> None:
        """Raises ConnectionError when the API process is gone."""
        self._socket.sendall(frame(self._encoder.encode(message)))

    def receive(self, timeout_ms: int) -> list[ToEngine | Undecodable]:
        """What has arrived, after waiting for it at most so long; raises ConnectionError when the other end is gone."""
        messages: list[ToEngine | Undecodable] = []
        while self._poll.poll(timeout_ms):
            data = self._socket.recv(READ_BYTES)
            if not data and self._deaf:
                return messages
            if not data:
                raise ConnectionResetError("the API process is gone")
            messages += map(self._decode, self._frames.feed(data))
            timeout_ms = 0
        return messages

    def _decode(self, payload: bytes) -> ToEngine | Undecodable:
        try:
            message: ToEngine = self._decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                match msgspec.msgpack.decode(payload):
                    case [str(tag), int(message_id), *_]:
                        return Undecodable(str(error), tag, message_id)
            return Undecodable(str(error))
        return message

    def close(self) -> None:
        self._socket.close()


class ClientChannel(asyncio.Protocol):
    """The API process's end, served by the event loop."""

    def __init__(self, handle: Callable[[FromEngine], None], lost: Callable[[], None]) -> None:
        """``lost`` is called once when the engine can no longer be talked to, also because of what it sent."""
        self._handle = handle
        self._lost = lost
        self._frames = Frames()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()

    def data_received(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            self._handle(self._decoder.decode(payload))

    def send(self, message: ToEngine) -> None:
        assert self._transport is not None
        self._transport.write(frame(self._encoder.encode(message)))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
