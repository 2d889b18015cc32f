"""What a request says about being kept."""

from __future__ import annotations

import re

from starlette.requests import Request

from slipstream.engine.messages import TrafficLevel
from slipstream.server.errors import InvalidRequestError

LEVELS: tuple[TrafficLevel, ...] = ("off", "tokens", "features")
LEVEL_HEADER = "X-Slipstream-Traffic"
DOMAIN_HEADER = "X-Slipstream-Domain"


def traffic_level(request: Request, most: TrafficLevel) -> TrafficLevel:
    """What may be kept of a request: what the server keeps, or less if the request says so.

    Raises InvalidRequestError for a header that means nothing.
    """
    asked = request.headers.get(LEVEL_HEADER)
    if asked is None:
        return most
    for level in LEVELS:
        if asked.strip().lower() == level:
            return min(level, most, key=LEVELS.index)
    raise InvalidRequestError(f"{LEVEL_HEADER}: {asked[:60]!r} is none of {', '.join(LEVELS)}", param=LEVEL_HEADER)


def traffic_domain(request: Request) -> str:
    """What a request is about, in its sender's words; raises InvalidRequestError for what is no name."""
    domain = request.headers.get(DOMAIN_HEADER, "").strip()
    if domain and not re.fullmatch(r"[\w.:/-]{1,64}", domain, re.ASCII):
        raise InvalidRequestError(
            f"{DOMAIN_HEADER}: at most 64 letters, digits and ._-:/, not {domain[:60]!r}", param=DOMAIN_HEADER
        )
    return domain
