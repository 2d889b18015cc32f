"""What web pages may do with a server through the browser of somebody who can reach it.

A page of others can make a browser send requests anywhere. The browser says so in ``Origin`` or ``Sec-Fetch-Site``,
unless the page's own name was made to lead to this server (DNS rebinding); then ``Host`` is a name it does not have.
Programs that are no browsers send none of these, and any ``Host``.
"""

from __future__ import annotations

from starlette.types import Scope

from slipstream.server.config import ServerConfig
from slipstream.server.errors import ForbiddenError, UnsupportedMediaTypeError
from slipstream.server.http.headers import header, host_name, is_address, is_loopback

ANY = "*"
ELSEWHERE = frozenset({"cross-site", "same-site"})
"""Values of Sec-Fetch-Site for requests of pages that are not of this server."""
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
READING = frozenset({"GET", "HEAD"})


class WebPages:
    """Refuses what pages of others send."""

    def __init__(self, config: ServerConfig) -> None:
        self._has_keys = bool(config.api_key or config.keys_file)
        self._local = is_loopback(config.host)
        self._origins = frozenset(origin.lower().removesuffix("/") for origin in config.allowed_origin)
        self._names = frozenset(host_name(name) for name in (config.host, *config.allowed_host))
        self._names_bind = ANY not in config.allowed_host and (
            bool(config.allowed_host) or (self._local and not self._has_keys)
        )
        self._any_origin = ANY in config.allowed_origin

    def check(self, scope: Scope) -> None:
        """Raises ForbiddenError or UnsupportedMediaTypeError."""
        host, origin = header(scope, "host"), header(scope, "origin")
        if host is not None and self._names_bind and not self._is_own(host):
            raise ForbiddenError(
                f"Host: {host[:100]!r} is no name of this server; start it with --allowed-host NAME if it is one",
                code="host_not_allowed",
            )
        site = (header(scope, "sec-fetch-site") or "").lower()
        if origin is None:
            foreign = site in ELSEWHERE and scope["method"] not in READING
        else:
            foreign = not self._may_use(origin, host or "")
        if foreign:
            raise ForbiddenError(
                f"web pages of {(origin or 'others')[:100]!r} may not use this server; see --allowed-origin",
                code="origin_not_allowed",
            )
        # A browser sends a body without a type, or of a type that forms have, to other servers without asking.
        if (origin is not None or site) and has_body(scope) and header(scope, "content-type") is None:
            raise UnsupportedMediaTypeError("a browser must declare the body as application/json")

    def _is_own(self, host: str) -> bool:
        """Whether a page under this name is one of this server's, as far as the name tells."""
        name = host_name(host)
        if is_loopback(name) or name in self._names:
            return True
        return not self._local and is_address(name)

    def _may_use(self, origin: str, host: str) -> bool:
        origin = origin.lower()
        if self._any_origin or origin in self._origins:
            return True
        scheme, _, authority = origin.partition("://")
        port = DEFAULT_PORTS.get(scheme)
        if port is None or authority.removesuffix(port) != host.lower().removesuffix(port):
            return False
        # With keys a page of a rebound name gets nowhere without one.
        return self._has_keys or self._is_own(host)


def has_body(scope: Scope) -> bool:
    return header(scope, "content-length") not in (None, "0") or header(scope, "transfer-encoding") is not None
