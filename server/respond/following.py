"""The events of a response in the background, for all who follow it: from its beginning, or from any event on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slipstream.server.access.deadline import DEADLINE
from slipstream.server.responses import EVENT_STREAM, cancelled_on_disconnect
from slipstream.server.service import Service

END = b"\n\n"


class EventLog:
    """Events are kept in their order; the sequence number of each is its place."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._is_closed = False
        self._changed = asyncio.Event()
        self.size = 0
        """In bytes."""

    def add(self, events: bytes) -> None:
        """Some whole events as a stream has them."""
        self._events += [event + END for event in events.split(END)[:-1]]
        self.size += len(events)
        self._tell()

    def close(self) -> None:
        """No more will come."""
        self._is_closed = True
        self._tell()

    async def follow(self, after: int) -> AsyncIterator[bytes]:
        """The events after that of this number (-1: all), as they come, until the last."""
        sent = after + 1
        while True:
            changed = self._changed
            if events := self._events[sent:]:
                sent += len(events)
                yield b"".join(events)
            elif self._is_closed:
                return
            else:
                await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class FollowingResponse(Response):
    """Who goes away ends only this, and may follow again."""

    def __init__(self, service: Service, events: EventLog, after: int = -1) -> None:
        super().__init__()
        self._service, self._events, self._after = service, events, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (limit := scope.get(DEADLINE)) is not None:
            limit.reschedule(None)  # what is followed has one of its own
        with self._service.responding():
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            async with cancelled_on_disconnect(receive, None):
                async for events in self._events.follow(self._after):
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
