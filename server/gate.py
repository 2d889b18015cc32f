"""The two layers around every route, as plain ASGI: who may come in, and what is counted on the way out."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.errors import ApiError, UnauthorizedError
from slipstream.server.metrics import Metrics

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})


class ApiKeys:
    """Lets requests in that carry one of the keys; the paths that say how the server is doing are open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._may_enter(scope):
            await self._app(scope, receive, send)
        else:
            await send_error(send, UnauthorizedError("send a valid API key as 'Authorization: Bearer KEY'"))

    def _may_enter(self, scope: Scope) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = sent.partition(b" ")
        # Every key is compared in full, so the time taken tells nothing about them.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class ResponseCounter:
    """Counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        def counting(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                route: Any = scope.get("route")
                self._metrics.responded(getattr(route, "path", "other"), message["status"])
            return send(message)

        await self._app(scope, receive, counting)


async def send_error(send: Send, error: ApiError) -> None:
    body = error.body()
    headers = [*error.headers(), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
