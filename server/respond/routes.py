"""The routes of /v1/responses."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from slipstream.server.http.description import BUSY, describe, parameter
from slipstream.server.respond import answers
from slipstream.server.respond.respond import Responder
from slipstream.server.respond.schema import BODIES, CancelResponseBody, CountInputTokensBody, RespondBody
from slipstream.server.service import Service

FOLLOWED = (parameter("stream", type="boolean"), parameter("starting_after", type="integer", minimum=-1))
DESCRIBED = (*BODIES, *answers.ANSWERS)


def respond_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    responder = Responder(service)

    @router.post(
        "/v1/responses",
        openapi_extra=describe(
            answers.ResponseObject, *BUSY, bodies=[RespondBody], stream=answers.ResponseEvent, stream_end=""
        ),
    )
    async def create(request: Request) -> Response:
        """Continue a conversation of items."""
        return await responder.create(request)

    @router.post(
        "/v1/responses/input_tokens",
        openapi_extra=describe(answers.ResponseInputTokens, *BUSY, bodies=[CountInputTokensBody]),
    )
    async def count(request: Request) -> Response:
        """How many tokens a conversation has."""
        return await responder.count(request)

    @router.get(
        "/v1/responses/{name}",
        openapi_extra=describe(
            answers.ResponseObject, 404, 503, query=FOLLOWED, stream=answers.ResponseEvent, stream_end=""
        ),
    )
    async def retrieve(request: Request, name: str) -> Response:
        """A response that is kept, or the events of one that is written in the background."""
        return responder.retrieve(request, name)

    @router.delete("/v1/responses/{name}", openapi_extra=describe(answers.ResponseDeleted, 404, 503))
    async def delete(request: Request, name: str) -> Response:
        """Forget a response."""
        return await responder.delete(request, name)

    @router.post(
        "/v1/responses/{name}/cancel",
        openapi_extra=describe(answers.ResponseObject, 404, 503, bodies=[CancelResponseBody]),
    )
    async def cancel(request: Request, name: str) -> Response:
        """End a response that is being written."""
        return await responder.cancel(request, name)

    return router
