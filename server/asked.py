"""What a small request says, to the admin API for example: its body and its query."""

from __future__ import annotations

from fastapi import Request

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import BodyType, parse, read_body
from slipstream.server.service import Service

MAX_BODY_BYTES = 32 * 2**10


async def body_of(service: Service, request: Request, model: type[BodyType], most: int = MAX_BODY_BYTES) -> BodyType:
    """Unknown fields are always refused; no body is an empty one. It may have ``most`` bytes, if the server lets it."""
    limit = min(service.config.max_body_bytes, most)
    return parse(model, await read_body(request, limit) or b"{}", "error")


def only(request: Request, *names: str) -> dict[str, str]:
    """The query's parameters; raises InvalidRequestError for one that is none of these."""
    for name in request.query_params:
        if name not in names:
            raise InvalidRequestError(f"unknown parameter {name[:60]!r}", param=name, code="unknown_parameter")
    return dict(request.query_params)
