"""The time limit of a request, from its first line to the last byte of its answer."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.errors import TimedOutError
from slipstream.server.gate import ADMIN_API, AdminPaths, send_error

DEADLINE = "slipstream.deadline"
"""The scope's key for the asyncio.Timeout of the request. A stream takes it over."""


class Deadline:
    """Ends requests at --request-timeout-s: with 504, or, in the middle of an answer, by closing the connection.

    What the admin key opens takes as long as it takes.
    """

    def __init__(self, app: ASGIApp, limit_s: float, admin: AdminPaths = ADMIN_API) -> None:
        self._app = app
        self._admin = admin
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._admin:
            await self._app(scope, receive, send)
            return
        started = False

        async def noticing(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            async with asyncio.timeout(self._limit_s) as limit:
                await self._app({**scope, DEADLINE: limit}, receive, noticing)
        except TimeoutError:
            if not limit.expired() or started:
                raise
            await send_error(send, TimedOutError("the request took longer than --request-timeout-s allows"))
