"""Whose turn it is to send weights: of two trainers, or one and the same that was started again, the later one's.

HTTP tells two clients of one machine apart by nothing but what the server has given them: a cookie, which clients that
keep a session send back of their own accord. Who sends none is taken at his word.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from slipstream.server.errors import ConflictError

Handler = Callable[[Request], Awaitable[Response]]


class Turns:
    """Decorators for the routes by which weights come."""

    def __init__(self, is_updating: Callable[[], bool]) -> None:
        """``is_updating``: whether an update is under way."""
        self._is_updating = is_updating
        # Cookies are of a host, not of a port: those of several servers must not replace each other.
        self.cookie = f"slipstream-update-{secrets.token_hex(4)}"
        self._now = ""

    def takes(self, handler: Handler) -> Handler:
        """The handler of a route by which a trainer comes, or comes again: what others have begun is over."""

        @functools.wraps(handler)
        async def handle(request: Request) -> Response:
            turn = self._now = secrets.token_hex(16)
            response = await handler(request)
            response.set_cookie(self.cookie, turn, httponly=True, samesite="strict")
            return response

        return handle

    def begins(self, handler: Handler) -> Handler:
        """The handler of a route by which an update begins: who has lost his turn does not end that of others."""
        return self.spares(self.takes(handler))

    def spares(self, handler: Handler) -> Handler:
        """The handler of a route that ends the update under way, if there is one: who has lost his turn has none."""

        @functools.wraps(handler)
        async def handle(request: Request) -> Response:
            if self._is_updating():
                self._check(request)
            return await handler(request)

        return handle

    def holds(self, handler: Handler) -> Handler:
        """The handler of a route by which an update goes on or ends: who has lost his turn is refused."""

        @functools.wraps(handler)
        async def handle(request: Request) -> Response:
            self._check(request)
            return await handler(request)

        return handle

    def _check(self, request: Request) -> None:
        """Raises ConflictError for the turn of another."""
        if request.cookies.get(self.cookie, self._now) != self._now:
            raise ConflictError(
                "another trainer has begun to send weights since: what this one has sent was given up; end one of the "
                "two, or begin anew when the other's update has ended",
                code="superseded",
            )
