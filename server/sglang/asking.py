"""How the control routes read bodies, and how they tell of failures."""

from __future__ import annotations

import base64
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import Request, Response
from pydantic import BaseModel

from slipstream.server.errors import ApiError, InvalidRequestError
from slipstream.server.http.body import Body, BodyType, parse, read_body
from slipstream.server.http.description import describe
from slipstream.server.http.json_response import JSONBody
from slipstream.server.service import Service
from slipstream.server.sglang.answers import SGLangFailure, SGLangOutcome

Handler = Callable[[Request], Awaitable[Response]]


async def body_of(service: Service, request: Request, model: type[BodyType]) -> BodyType:
    """No body is an empty one."""
    with service.bodies.hold() as held:
        return parse(model, await read_body(request, service.config.max_body_bytes, held) or b"{}", "warn")


def outcome(message: str, **more: Any) -> Response:
    return JSONBody({"success": True, "message": message, **more})


def described(body: type[Body], answer: type[BaseModel] = SGLangOutcome) -> dict[str, Any]:
    """For a route that tells of failures in two ways."""
    return describe(answer, 400, 404, 409, 413, 415, 429, 500, 503, bodies=[body], errors=SGLangFailure)


def shared_handles(text: str, param: str) -> bytes:
    """Tensors that another process shares, as they are pickled. Raises InvalidRequestError for what is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # which binascii.Error is, too; the base class is for text beyond ASCII
        raise InvalidRequestError(f"{param.partition('.')[0]}: is no base64", param=param) from None


def telling_failures(handler: Handler) -> Handler:
    """The handler of a route of which some callers read the status, and others ``success`` and a message."""

    @functools.wraps(handler)
    async def told(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            told = {"success": False, "message": error.message, "error_message": error.message}
            body = told | msgspec.json.decode(error.body())
            headers = {name.decode(): value.decode() for name, value in error.headers()}
            return Response(msgspec.json.encode(body), error.status, headers)

    return told
