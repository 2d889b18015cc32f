"""The time limit of a request, from its first line to the last byte of its answer."""

from __future__ import annotations

import asyncio
import math

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.access.gate import ADMIN_API, AdminPaths, send_error
from slipstream.server.errors import ApiError, InvalidRequestError, TimedOutError
from slipstream.server.http.headers import header

TIMEOUT_HEADER = "x-slipstream-timeout-s"
DEADLINE = "slipstream.deadline"
"""The scope's key for the asyncio.Timeout of the request. A stream takes it over."""
LIMIT_S = "slipstream.limit_s"
"""The scope's key for the seconds it may take."""
TOO_LONG = "the request took longer than it, or --request-timeout-s, allows"


class Deadline:
    """Ends requests at --request-timeout-s, or when their header says: with 504, or, in the middle of an answer, by
    closing the connection.

    What the admin key opens takes as long as it takes.
    """

    def __init__(self, app: ASGIApp, limit_s: float, admin: AdminPaths = ADMIN_API) -> None:
        """``limit_s`` is that of the server; 0: none."""
        self._app = app
        self._admin = admin
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._admin:
            await self._app(scope, receive, send)
            return
        try:
            limit_s = shortest(self._limit_s, asked_seconds(scope))
        except ApiError as error:
            return await send_error(send, error)
        if limit_s is None:
            await self._app(scope, receive, send)
            return
        started = False

        async def noticing(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            async with asyncio.timeout(limit_s) as limit:
                await self._app({**scope, DEADLINE: limit, LIMIT_S: limit_s}, receive, noticing)
        except TimeoutError:
            if not limit.expired() or started:
                raise
            await send_error(send, TimedOutError(TOO_LONG))


def shortest(*limits: float | None) -> float | None:
    """The shortest of some limits; None and 0 are none."""
    return min((limit for limit in limits if limit), default=None)


def asked_seconds(scope: Scope) -> float | None:
    """How long the sender of a request would wait for the whole answer. Raises InvalidRequestError."""
    text = header(scope, TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER}: a number of seconds above 0, not {text[:60]!r}", param=TIMEOUT_HEADER
        )
    return seconds
