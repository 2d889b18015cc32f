"""The layers around every route, as plain ASGI: who may come in, and what is counted on the way out.

From the outside in: ``ResponseCounter``; ``Threshold``, which refuses what is said twice, what web pages of others send
and strangers at the admin API of a server without an admin key; ``CrossOrigin``, which answers browsers that ask for
a page that may; ``KeyCheck``, which puts a ``Principal`` into the scope.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.access.keys import KeyRing, Keys, Role
from slipstream.server.access.principal import SCOPE_ENTRY, Principal, RequestLimits
from slipstream.server.access.web_pages import ANY, ELSEWHERE, WebPages
from slipstream.server.config import ServerConfig
from slipstream.server.errors import (
    ApiError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    UnauthorizedError,
)
from slipstream.server.http.body import JSON
from slipstream.server.http.headers import check_repeated, header, is_loopback
from slipstream.server.telemetry.metrics import Metrics

OPEN_PATHS = frozenset(
    {
        "/health",
        "/health/",
        "/health_generate",
        "/liveness",
        "/ping",
        "/ready",
        "/metrics",
        "/version",
        "/",
        "/dashboard",
    }
)
"""The chat and the dashboard are pages without data; what they show they ask the API for."""
ADMIN_PATH = "/admin/"
RATE_HEADERS = [
    f"x-ratelimit-{kind}-{name}" for name in ("requests", "tokens") for kind in ("limit", "remaining", "reset")
]
"""What an Account's answers say of it."""
CROSS_ORIGIN_METHODS = ("DELETE", "GET", "HEAD", "POST")
PROXY_HEADERS = frozenset({b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip"})
PROXY_PREFIXES = (b"x-forwarded-", b"x-envoy-")


class AdminPaths:
    """What the admin key opens: the admin API, and the paths by which trainers control a server."""

    def __init__(self, controls: Iterable[str] = ()) -> None:
        self._controls = frozenset(controls)

    def __contains__(self, path: str) -> bool:
        return path.startswith(ADMIN_PATH) or path in self._controls


ADMIN_API = AdminPaths()


def key_ring(config: ServerConfig) -> KeyRing:
    """The keys of a server. Raises ConfigError for a file that cannot be used."""
    limits = RequestLimits(config.max_n, config.max_logprobs, config.most_urgent_priority)
    users, admins = Keys(config.api_key, "--api-key"), Keys(config.admin_key, "--admin-key", "admin")
    return KeyRing(users, admins, config.keys_file, limits)


def guarded(
    app: ASGIApp, config: ServerConfig, keys: KeyRing, metrics: Metrics, admin: AdminPaths = ADMIN_API
) -> ASGIApp:
    """The application behind everything that decides who may use it."""
    app = KeyCheck(app, keys, admin)
    if config.allowed_origin:
        origins = [origin.lower().removesuffix("/") for origin in config.allowed_origin]
        app = CrossOrigin(
            app,
            allow_origins=[ANY] if ANY in origins else origins,
            allow_methods=CROSS_ORIGIN_METHODS,
            allow_headers=("*",),
            expose_headers=("x-request-id", "request-id", "retry-after", *RATE_HEADERS),
            allow_private_network=True,
        )
    return ResponseCounter(Threshold(app, config, keys, admin), metrics)


class CrossOrigin(CORSMiddleware):
    """One whose refusals look like all others, and to which origins are the same in capitals, as to browsers."""

    def is_allowed_origin(self, origin: str) -> bool:
        return super().is_allowed_origin(origin.lower())

    def preflight_response(self, request_headers: Headers) -> Response:
        found = super().preflight_response(request_headers)
        if found.status_code < 400:
            return found
        error = InvalidRequestError(
            f"web pages may use {', '.join(CROSS_ORIGIN_METHODS)}, and of other origins only those of --allowed-origin",
            param="access-control-request-method",
        )
        return Response(error.body(), error.status, media_type=JSON)


class Threshold:
    """Refuses requests whose senders nobody can trust whatever key they have, or that nobody sends for himself."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: KeyRing, admin: AdminPaths) -> None:
        self._app = app
        self._admin = admin
        self._pages = WebPages(config)
        self._keys = keys
        # A server that others reach, that a proxy stands before or that asks for keys cannot tell who stands behind a
        # loopback address.
        self._trusts_loopback = is_loopback(config.host) and not config.behind_proxy and not keys.asks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                return await send_error(send, error)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if scope["path"].endswith("\n"):  # which what matches routes takes for nothing
            raise NotFoundError(f"there is no route {scope['method']} {scope['path']!r}")
        check_repeated(scope)
        if (
            scope["path"] in self._admin
            and not self._keys.has_admins
            and not (self._trusts_loopback and is_local(scope))
        ):
            raise ForbiddenError(
                "without --admin-key what controls the server answers only on one that listens on a loopback address, "
                "asks users for no key and has no --behind-proxy, and to clients on its own machine that are neither "
                "proxies nor web pages of others; start the server with --admin-key KEY",
                code="admin_key_required",
            )
        self._pages.check(scope)


class KeyCheck:
    """Lets requests in that carry a key of their door, and says whose it is; what tells how the server is is open.

    Answers say what is left of the limits of their key.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, admin: AdminPaths) -> None:
        self._app = app
        self._keys = keys
        self._admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            principal = self._principal(scope)
        except ApiError as error:
            return await send_error(send, error)
        scope[SCOPE_ENTRY] = principal
        limits = principal.account.limits

        def telling(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *principal.account.headers()]
            return send(message)

        limited = limits.requests_per_minute or limits.tokens_per_minute
        await self._app(scope, receive, telling if limited else send)

    def _principal(self, scope: Scope) -> Principal:
        """Raises UnauthorizedError, ForbiddenError."""
        role: Role = "admin" if scope["path"] in self._admin else "user"
        asks = self._keys.has_admins if role == "admin" else self._keys.asks
        if not asks or scope["path"] in OPEN_PATHS:
            return replace(self._keys.anonymous, role=role)
        kind = {"admin": "admin", "user": "API"}[role]
        sent = sent_key(scope)
        principal = None if sent is None else self._keys.holder(sent)
        if principal is None:
            raise UnauthorizedError(f"send a valid {kind} key as 'Authorization: Bearer KEY'")
        if principal.role != role:
            raise ForbiddenError(f"this route is opened by an {kind} key, and by no other", code="wrong_key")
        return principal


def sent_key(scope: Scope) -> bytes | None:
    """The key that a request carries; ``x-api-key`` is where clients of Anthropic's API have it."""
    sent = header(scope, "authorization")
    if sent is None:
        secret = header(scope, "x-api-key")
    else:
        scheme, _, secret = sent.partition(" ")
        if scheme.lower() != "bearer":
            return None
    return secret.strip(" \t").encode("latin-1") if secret else None


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
