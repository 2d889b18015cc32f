"""Routes of other servers that this one does not have: trainers are told what to use instead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, Request, Response

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import LooseBody, read_body
from slipstream.server.http.description import Answer, describe


class RefusedBody(LooseBody):
    """Whatever is sent."""


class NeverAnswered(Answer):
    """These routes answer with errors only."""


DESCRIBED = (RefusedBody, NeverAnswered)


def refusing_router(most_bytes: int, instead: Mapping[str, str]) -> APIRouter:
    """``instead``: by path, the end of a sentence that begins with it. ``most_bytes`` of a body are read."""
    router = APIRouter(default_response_class=Response)
    told = describe(NeverAnswered, bodies=[RefusedBody])
    for path, sentence in instead.items():
        router.post(path, openapi_extra=told, summary="Refused")(refusing(path, sentence, most_bytes))
    return router


def refusing(path: str, sentence: str, most_bytes: int) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        await read_body(request, most_bytes)
        raise InvalidRequestError(f"{path} is not supported: {sentence}", code="unsupported_route")

    return refuse
