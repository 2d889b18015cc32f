"""The outermost layer, as plain ASGI: what is alike for every answer of every route, whoever gives it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.telemetry import log

REQUEST_ID = b"x-request-id"


class Edge:
    """Gives every answer an X-Request-Id, and lets HEAD ask for what GET answers.

    The id is the caller's if it is fit to be repeated, or else a fresh one. It is in ``scope["state"]["request_id"]``,
    where a body that names the request may replace it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = {**scope.get("state", {}), "request_id": sent_id(scope["headers"]) or fresh_id()}
        log.request_id.set(state["request_id"])
        # uvicorn keeps the scope as it came and leaves out the body of the answer to a HEAD.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]

        def named(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, state["request_id"].encode())]
            return send(message)

        await self._app({**scope, "state": state, "method": method}, receive, named)


def sent_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The caller's X-Request-Id, if it is fit to be repeated."""
    value = next((value for name, value in headers if name == REQUEST_ID), b"")
    return value.decode() if re.fullmatch(rb"[\x21-\x7e]{1,128}", value) else None


def fresh_id() -> str:
    return secrets.token_hex(12)
