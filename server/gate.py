"""The layers around every route, as plain ASGI: who may come in, and what is counted on the way out."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.errors import ApiError, ForbiddenError, UnauthorizedError
from slipstream.server.metrics import Metrics

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/dashboard"})
"""The dashboard is a page without data; what it shows it asks the admin API for."""
ADMIN_PATH = "/admin/"


class ApiKeys:
    """Lets requests in that carry one of the keys; the paths that say how the server is doing are open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or is_admin(scope) or has_key(scope, self._keys):
            await self._app(scope, receive, send)
        else:
            await send_error(send, UnauthorizedError("send a valid API key as 'Authorization: Bearer KEY'"))


class AdminKeys:
    """Lets requests to the admin API in that carry one of its keys; without keys, those from this machine."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_admin(scope):
            await self._app(scope, receive, send)
        elif self._keys:
            if has_key(scope, self._keys):
                await self._app(scope, receive, send)
            else:
                await send_error(send, UnauthorizedError("send a valid admin key as 'Authorization: Bearer KEY'"))
        elif is_local(scope):
            await self._app(scope, receive, send)
        else:
            await send_error(
                send,
                ForbiddenError(
                    "without --admin-key the admin API answers only to clients on its own machine that are neither "
                    "proxies nor web pages of others; start the server with --admin-key KEY",
                    code="admin_key_required",
                ),
            )


def is_admin(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.startswith(ADMIN_PATH)


def has_key(scope: Scope, keys: Sequence[bytes]) -> bool:
    sent = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, key = sent.partition(b" ")
    # Every key is compared in full, so the time taken tells nothing about them.
    matches = [hmac.compare_digest(key.strip(), known) for known in keys]
    return scheme.lower() == b"bearer" and any(matches)


def is_local(scope: Scope) -> bool:
    """Whether somebody at this machine asks, for himself.

    A proxy here asks for others. A web page of others in a browser here names its origin, or, if its name leads to
    this machine, a foreign host.
    """
    headers = dict(scope["headers"])
    if any(name in headers for name in (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")):
        return False
    host = headers.get(b"host", b"localhost").decode("latin-1")
    origin = headers.get(b"origin")
    if origin is not None and origin.decode("latin-1") != f"http://{host}":
        return False
    client = scope.get("client")
    return is_loopback(host) and client is not None and is_loopback(client[0])


def is_loopback(host: str) -> bool:
    """Of a name or an address, with or without a port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host if host.count(":") > 1 else host.split(":")[0]
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


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
