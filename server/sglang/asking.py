"""How the control routes read bodies, and how they tell of failures."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import Request, Response

from slipstream.server.body import BodyType, parse, read_body
from slipstream.server.errors import ApiError
from slipstream.server.json_response import JSONBody
from slipstream.server.service import Service

Handler = Callable[[Request], Awaitable[Response]]


async def body_of(service: Service, request: Request, model: type[BodyType]) -> BodyType:
    """No body is an empty one."""
    with service.bodies.hold() as held:
        return parse(model, await read_body(request, service.config.max_body_bytes, held) or b"{}", "warn")


def outcome(message: str, **more: Any) -> Response:
    return JSONBody({"success": True, "message": message, **more})


def telling_failures(handler: Handler) -> Handler:
    """The handler of a route of which some callers read the status, and others ``success`` and ``message``."""

    @functools.wraps(handler)
    async def told(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            body = {"success": False, "message": error.message} | msgspec.json.decode(error.body())
            headers = {name.decode(): value.decode() for name, value in error.headers()}
            return Response(msgspec.json.encode(body), error.status, headers)

    return told
