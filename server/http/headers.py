"""Headers as they were sent. What is read of one header must not depend on which of its copies is looked at."""

from __future__ import annotations

import ipaddress
import sys
from collections import Counter
from typing import TYPE_CHECKING

from slipstream.server.errors import InvalidRequestError

if TYPE_CHECKING:
    from starlette.types import Scope

ONCE = frozenset(
    {
        *("authorization", "content-length", "content-type", "host", "origin", "x-request-id", "x-slipstream-domain"),
        *("x-api-key", "x-slipstream-timeout-s"),
        *("access-control-request-headers", "access-control-request-method", "sec-fetch-site"),
        *("content-encoding", "transfer-encoding"),
    }
)
"""Headers that may come once. The other one that is read, X-Slipstream-Traffic, has a strictest value."""


def check_repeated(scope: Scope) -> None:
    """Raises InvalidRequestError for a header that may be there once and is there twice."""
    counts = Counter(name for name, _ in scope["headers"])
    for name in counts:
        if counts[name] > 1 and (text := name.decode("latin-1").lower()) in ONCE:
            raise InvalidRequestError(f"the header {text} was sent twice", param=text, code="repeated_header")


def header(scope: Scope, name: str) -> str | None:
    """The value of a header that ``check_repeated`` lets through once only; ``name`` is in lower case."""
    return next(iter(header_values(scope, name)), None)


def content_length(scope: Scope) -> int:
    """Bytes of the body that are announced, 0 if none are; more than any limit where that is no number."""
    said = header(scope, "content-length") or "0"
    return int(said) if said.isdecimal() and len(said) < len(str(sys.maxsize)) else sys.maxsize


def header_values(scope: Scope, name: str) -> list[str]:
    """What all copies of a header say; ``name`` is in lower case."""
    wanted = name.encode()
    return [value.decode("latin-1").strip(" \t") for found, value in scope.get("headers", ()) if found == wanted]


def host_name(host: str) -> str:
    """The name or address in ``host`` or ``host:port``, in lower case."""
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host if host.count(":") > 1 else host.partition(":")[0]
    return name.lower().removesuffix(".")


def is_address(name: str) -> bool:
    """Whether this is an address, which no name server can lead elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a name or an address, with or without a port, is this machine's own."""
    name = host_name(host)
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761: never resolved to anything else
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
