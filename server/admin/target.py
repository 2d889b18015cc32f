"""The part of the admin API that pauses the engine and gives the model other weights while it serves."""

from __future__ import annotations

import json

import msgspec
from fastapi import APIRouter, Request, Response

from slipstream.server.admin import answers
from slipstream.server.admin.asked import body_of, only
from slipstream.server.admin.schema import BeginBody, EmptyBody, PauseBody, ReadBody, UpdateBody
from slipstream.server.body import read_body
from slipstream.server.description import describe
from slipstream.server.errors import InvalidRequestError
from slipstream.server.json_response import JSONBody
from slipstream.server.service import Service

TENSORS = "application/octet-stream"
"""Which a web page cannot send without asking first."""
FIRST_ROWS = "first_rows"
"""In the metadata of a safetensors file: a JSON object of the first rows of tensors that are only a part."""


def target_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response, prefix="/admin/v1")
    control = service.control

    def update(version: int) -> Response:
        return JSONBody({"version": version})

    @router.post("/pause", openapi_extra=describe(answers.Paused, 503, bodies=[PauseBody], body_required=False))
    async def pause(request: Request) -> Response:
        """Let no request begin, and none go on but as the mode says, until it is resumed."""
        await control.pause((await body_of(service, request, PauseBody)).mode)
        return JSONBody({"paused": True})

    @router.post("/resume", openapi_extra=describe(answers.Paused, 503, bodies=[EmptyBody], body_required=False))
    async def resume(request: Request) -> Response:
        """End a pause."""
        await body_of(service, request, EmptyBody)
        await control.resume()
        return JSONBody({"paused": False})

    @router.post("/target/begin", openapi_extra=describe(answers.Update, 503, bodies=[BeginBody]))
    async def begin(request: Request) -> Response:
        """Begin an update of the model's weights."""
        asked = await body_of(service, request, BeginBody)
        await control.begin_update(str(asked.version), asked.mode)
        return update(asked.version)

    @router.post("/target/fill", openapi_extra=describe(answers.Update, 409, 503, raw_body=TENSORS))
    async def fill(request: Request) -> Response:
        """Send tensors of an update, or rows of them, as a safetensors file."""
        version = version_of(request)
        data = await read_body(request, service.config.max_body_bytes, media_type=TENSORS)
        await control.fill(str(version), data, first_rows(data))
        return update(version)

    @router.post("/target/read", openapi_extra=describe(answers.Update, 409, 503, bodies=[ReadBody]))
    async def read(request: Request) -> Response:
        """Have the server read tensors of an update from its files."""
        asked = await body_of(service, request, ReadBody)
        await control.read(str(asked.version), asked.path)
        return update(asked.version)

    @router.post("/target/finish", openapi_extra=describe(answers.Updated, 409, 503, bodies=[UpdateBody]))
    async def finish(request: Request) -> Response:
        """Serve with the new weights, all of them, from now on."""
        asked = await body_of(service, request, UpdateBody)
        report = await control.finish_update(str(asked.version))
        return JSONBody(msgspec.structs.asdict(report) | {"version": asked.version})

    @router.post("/target/cancel", openapi_extra=describe(answers.Update, 503, bodies=[UpdateBody]))
    async def cancel(request: Request) -> Response:
        """Give an update up; the old weights go on serving."""
        asked = await body_of(service, request, UpdateBody)
        await control.cancel_update(str(asked.version))
        return update(asked.version)

    return router


def version_of(request: Request) -> int:
    """The one parameter of the query."""
    text = only(request, "version").get("version", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InvalidRequestError(f"version: a number in the query, ?version=7, not {text[:60]!r}", param="version")
    return int(text)


def first_rows(tensors: bytes) -> dict[str, int]:
    """What the metadata of a safetensors file says of them; the engine judges the rest of the file."""
    try:
        header = json.loads(tensors[8 : 8 + int.from_bytes(tensors[:8], "little")])
        found = msgspec.json.decode(header.get("__metadata__", {}).get(FIRST_ROWS, "{}"), type=dict[str, int])
    except (ValueError, AttributeError, RecursionError, msgspec.MsgspecError, TypeError):
        raise InvalidRequestError(
            "the body is no safetensors file, or its metadata has a first_rows that is no JSON object of numbers"
        ) from None
    return found
