"""What a request says about itself: who its tenant is, whether it may be kept, and what it is about.

Routers forward few headers, so each of these can stand in the body's ``metadata`` too, which they pass on. What is said
in several places counts in its strictest reading; what cannot be true at once is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.requests import Request

from slipstream.drafter.routes import DOMAIN_NAME
from slipstream.engine.messages import NewRequest, TrafficLevel
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.headers import header_values

LEVELS: tuple[TrafficLevel, ...] = ("off", "tokens", "features")
LEVEL_HEADER = "X-Slipstream-Traffic"
DOMAIN_HEADER = "X-Slipstream-Domain"
LEVEL_KEY, DOMAIN_KEY, TENANT_KEY = "slipstream_traffic", "slipstream_domain", "slipstream_tenant"
KEYS = (LEVEL_KEY, DOMAIN_KEY, TENANT_KEY)
"""Keys of ``metadata`` that are read; the rest of it is the client's own."""
MAX_TENANT_CHARS = 512


@dataclass(frozen=True, slots=True)
class Statement:
    """What a request says; empty and None where it says nothing."""

    level: TrafficLevel | None
    domain: str
    user: str

    def kept(self, most: TrafficLevel) -> TrafficLevel:
        """What may be kept of it, where silence means consent."""
        return most if self.level is None else min(self.level, most, key=LEVELS.index)


Consent = Literal["opt-out", "opt-in"]


def read_statement(
    request: Request, metadata: Mapping[str, Any] | None, user: str | None, silence: Consent
) -> Statement:
    """``silence`` says what it means to say nothing about being kept.

    Raises:
        InvalidRequestError: naming the header or the field, for what means nothing or contradicts itself.
    """
    fields = metadata_fields(metadata or {})
    levels = [
        _level(part.strip(), LEVEL_HEADER)
        for value in header_values(request.scope, LEVEL_HEADER.lower())
        for part in value.split(",")  # what some proxies make of a header that was sent twice
    ]
    if LEVEL_KEY in fields:
        levels.append(_level(fields[LEVEL_KEY], f"metadata.{LEVEL_KEY}"))
    domains = [(DOMAIN_HEADER, value) for value in header_values(request.scope, DOMAIN_HEADER.lower())]
    if DOMAIN_KEY in fields:
        domains.append((f"metadata.{DOMAIN_KEY}", fields[DOMAIN_KEY]))
    for where, domain in domains:
        _check_domain(domain, where)
    tenants = [("user", user)] if user else []
    if TENANT_KEY in fields:
        tenants.append((f"metadata.{TENANT_KEY}", fields[TENANT_KEY]))
    level = min(levels, key=LEVELS.index, default="off" if silence == "opt-in" else None)
    return Statement(level, _only(domains), _only(tenants))


def keeping_at_most(request: NewRequest, levels: Sequence[TrafficLevel]) -> NewRequest:
    """The request where text comes with it of others that allow no more than these levels."""
    strictest = min([request.traffic, *levels], key=LEVELS.index)
    return msgspec.structs.replace(request, traffic=strictest, remember=request.remember and "off" not in levels)


def metadata_fields(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The fields of metadata that are among KEYS and not null.

    Raises InvalidRequestError also for what was probably meant to be one of them: refused consent must not be lost
    because of a spelling.
    """
    found = {}
    for name, value in metadata.items():
        if name not in KEYS:
            if re.match(r"[\W_]*(x[\W_]*)?slipstream", name, re.IGNORECASE):
                raise InvalidRequestError(
                    f"metadata: {name[:60]!r} is none of {', '.join(KEYS)}", param="metadata", code="unknown_parameter"
                )
        elif value is not None:
            if not isinstance(value, str) or len(value) > MAX_TENANT_CHARS:
                raise InvalidRequestError(
                    f"metadata.{name}: must be a text of at most {MAX_TENANT_CHARS} characters",
                    param=f"metadata.{name}",
                )
            found[name] = value
    return found


def _level(text: str, where: str) -> TrafficLevel:
    for level in LEVELS:
        if text.strip().lower() == level:
            return level
    raise InvalidRequestError(f"{where}: {text[:60]!r} is none of {', '.join(LEVELS)}", param=where)


def _check_domain(domain: str, where: str) -> None:
    if domain and not DOMAIN_NAME.fullmatch(domain):
        raise InvalidRequestError(f"{where}: at most 64 letters, digits and ._-:/, not {domain[:60]!r}", param=where)


def _only(said: list[tuple[str, str]]) -> str:
    """What is said in one place or in several alike."""
    for where, value in said:
        if value != said[0][1]:
            raise InvalidRequestError(f"{where} contradicts {said[0][0]}", param=where)
    return said[0][1] if said else ""
