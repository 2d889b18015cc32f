"""The layers around every route, as plain ASGI: who may come in, and what is counted on the way out.

From the outside in: ``ResponseCounter``; ``Threshold``, which refuses what is said twice, what web pages of others send
and strangers at the admin API of a server without an admin key; ``CORSMiddleware``, which answers browsers that ask for
a page that may; ``KeyCheck``, which puts a ``Principal`` into the scope.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from dataclasses import replace
from typing import Any, Literal

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.config import ServerConfig
from slipstream.server.errors import ApiError, ForbiddenError, UnauthorizedError
from slipstream.server.headers import check_repeated, header, is_loopback
from slipstream.server.metrics import Metrics
from slipstream.server.principal import SCOPE_ENTRY, Keys, Principal, RequestLimits
from slipstream.server.web_pages import ANY, ELSEWHERE, WebPages

OPEN_PATHS = frozenset({"/health", "/health/", "/health_generate", "/ready", "/metrics", "/version", "/", "/dashboard"})
"""The chat and the dashboard are pages without data; what they show they ask the API for."""
ADMIN_PATH = "/admin/"
PROXY_HEADERS = frozenset({b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip"})
PROXY_PREFIXES = (b"x-forwarded-", b"x-envoy-")


class AdminPaths:
    """What the admin key opens: the admin API, and the paths by which trainers control a server."""

    def __init__(self, controls: Iterable[str] = ()) -> None:
        self._controls = frozenset(controls)

    def __contains__(self, path: str) -> bool:
        # What matches routes takes a line break at the end of a path for nothing.
        return path.startswith(ADMIN_PATH) or path.removesuffix("\n") in self._controls


ADMIN_API = AdminPaths()


def guarded(app: ASGIApp, config: ServerConfig, metrics: Metrics, admin: AdminPaths = ADMIN_API) -> ASGIApp:
    """The application behind everything that decides who may use it."""
    app = KeyCheck(app, config, admin)
    if config.allowed_origin:
        origins = [origin.removesuffix("/") for origin in config.allowed_origin]
        app = CORSMiddleware(
            app,
            allow_origins=[ANY] if ANY in origins else origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
            allow_private_network=True,
        )
    return ResponseCounter(Threshold(app, config, admin), metrics)


class Threshold:
    """Refuses requests whose senders nobody can trust whatever key they have, or that nobody sends for himself."""

    def __init__(self, app: ASGIApp, config: ServerConfig, admin: AdminPaths) -> None:
        self._app = app
        self._admin = admin
        self._pages = WebPages(config)
        self._admin_has_keys = bool(config.admin_key)
        # A server that others reach, that a proxy stands before or that asks for keys cannot tell who stands behind a
        # loopback address.
        self._trusts_loopback = is_loopback(config.host) and not config.behind_proxy and not config.api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                return await send_error(send, error)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        check_repeated(scope)
        if (
            scope["path"] in self._admin
            and not self._admin_has_keys
            and not (self._trusts_loopback and is_local(scope))
        ):
            raise ForbiddenError(
                "without --admin-key what controls the server answers only on one that listens on a loopback address, "
                "has no --api-key and no --behind-proxy, and to clients on its own machine that are neither proxies "
                "nor web pages of others; start the server with --admin-key KEY",
                code="admin_key_required",
            )
        self._pages.check(scope)


class KeyCheck:
    """Lets requests in that carry a key of their door, and says whose it is; what tells how the server is is open."""

    def __init__(self, app: ASGIApp, config: ServerConfig, admin: AdminPaths) -> None:
        self._app = app
        self._admin = admin
        self._users = Keys(config.api_key, "--api-key")
        self._admins = Keys(config.admin_key, "--admin-key")
        self._limits = RequestLimits(config.max_n, config.max_logprobs, config.most_urgent_priority)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            admin = scope["path"] in self._admin
            keys = self._admins if admin else self._users
            principal: Principal | None = Principal()
            if keys and scope["path"] not in OPEN_PATHS:
                principal = keys.holder(sent_key(scope))
            if principal is None:
                kind = "admin" if admin else "API"
                return await send_error(
                    send, UnauthorizedError(f"send a valid {kind} key as 'Authorization: Bearer KEY'")
                )
            role: Literal["user", "admin"] = "admin" if admin else "user"
            scope[SCOPE_ENTRY] = replace(principal, role=role, limits=self._limits)
        await self._app(scope, receive, send)


def sent_key(scope: Scope) -> str | None:
    """The Authorization header, or what stands for it: clients of Anthropic's API send keys in a header of its own."""
    if (sent := header(scope, "authorization")) is None and (key := header(scope, "x-api-key")) is not None:
        return f"Bearer {key}"
    return sent


def is_local(scope: Scope) -> bool:
    """Whether somebody at this machine asks, for himself.

    A proxy here asks for others. A web page of others in a browser here names its origin, or, if its name leads to
    this machine, a foreign host.
    """
    for name, _ in scope["headers"]:
        if name in PROXY_HEADERS or name.startswith(PROXY_PREFIXES):
            return False
    if header(scope, "sec-fetch-site") in ELSEWHERE:
        return False
    host = header(scope, "host")
    host = "localhost" if host is None else host
    origin = header(scope, "origin")
    if origin is not None and origin != f"http://{host}":
        return False
    client = scope.get("client")
    return is_loopback(host) and client is not None and is_loopback(client[0])


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
