"""The part of the admin API that pauses the engine and gives the model other weights while it serves."""

from __future__ import annotations

import json

import msgspec
from fastapi import APIRouter, Request, Response

from slipstream.server.admin import answers
from slipstream.server.admin.schema import (
    AbortBody,
    BeginBody,
    EmptyBody,
    FinishBody,
    GroupBody,
    JoinBody,
    PauseBody,
    ReadBody,
    ReceiveBody,
    SharedBody,
    SleepBody,
    TensorBody,
    UpdateBody,
    WakeBody,
)
from slipstream.server.asked import body_of, only
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body, read_body
from slipstream.server.http.description import describe, parameter
from slipstream.server.http.json_response import JSONBody
from slipstream.server.rollout import sources
from slipstream.server.rollout.control import ALL_MEMORY
from slipstream.server.service import Service

TENSORS = "application/octet-stream"
VERSION = [parameter("version", required=True, type="integer", minimum=0, exclusiveMaximum=10**9)]
"""Which a web page cannot send without asking first."""
TENSORS_BYTES = 4 << 20
"""Largest body that describes tensors."""
TARGET_BODIES: tuple[type[Body], ...] = (
    *(EmptyBody, PauseBody, AbortBody, SleepBody, WakeBody, UpdateBody, BeginBody, FinishBody, ReadBody, SharedBody),
    *(TensorBody, ReceiveBody, GroupBody, JoinBody),
)
FIRST_ROWS = "first_rows"
"""In the metadata of a safetensors file: a JSON object of the first rows of tensors that are only a part."""


def target_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response, prefix="/admin/v1")
    control = service.control
    turns = control.turns

    def filled(version: int, missing: int) -> Response:
        return JSONBody({"version": version, "missing": missing})

    @router.post("/pause", openapi_extra=describe(answers.Paused, 503, bodies=[PauseBody]))
    async def pause(request: Request) -> Response:
        """Let no request begin, and none go on but as the mode says, until it is resumed."""
        await control.pause((await body_of(service, request, PauseBody)).mode)
        return JSONBody({"paused": True})

    @router.post("/resume", openapi_extra=describe(answers.Paused, 503, bodies=[EmptyBody]))
    async def resume(request: Request) -> Response:
        """End a pause."""
        await body_of(service, request, EmptyBody)
        await control.resume()
        return JSONBody({"paused": False})

    @router.post("/abort", openapi_extra=describe(answers.Aborted, 503, bodies=[AbortBody]))
    async def abort(request: Request) -> Response:
        """End requests by their ids, or all of them; each is answered with what it has said so far."""
        asked = await body_of(service, request, AbortBody, TENSORS_BYTES)
        service.require_ready()
        return JSONBody({"aborted": await control.abort(asked.ids)})

    @router.post("/sleep", openapi_extra=describe(answers.ReleasedMemory, 503, bodies=[SleepBody]))
    async def sleep(request: Request) -> Response:
        """Give memory of the cache and of the weights back to the system."""
        asked = await body_of(service, request, SleepBody)
        await control.release_memory(asked.tags or ALL_MEMORY, asked.keep_weights, asked.mode)
        return JSONBody({"released": sorted(control.released)})

    @router.post("/wake", openapi_extra=describe(answers.ReleasedMemory, 503, bodies=[WakeBody]))
    async def wake(request: Request) -> Response:
        """Take memory again, and serve on when all of it is back."""
        asked = await body_of(service, request, WakeBody)
        await control.resume_memory(asked.tags or ALL_MEMORY)
        return JSONBody({"released": sorted(control.released)})

    @router.post("/target/begin", openapi_extra=describe(answers.Update, 503, bodies=[BeginBody]))
    @turns.begins
    async def begin(request: Request) -> Response:
        """Begin an update of the model's weights."""
        asked = await body_of(service, request, BeginBody)
        await control.begin_update(str(asked.version), asked.mode)
        return JSONBody({"version": asked.version})

    @router.post("/target/fill", openapi_extra=describe(answers.Filled, 409, 503, raw_body=TENSORS, query=VERSION))
    @turns.holds
    async def fill(request: Request) -> Response:
        """Send tensors of an update, or rows of them, as a safetensors file."""
        version = version_of(request)
        data = await read_body(request, service.config.max_body_bytes, media_type=TENSORS)
        return filled(version, await control.fill(str(version), sources.from_bytes(data, first_rows(data))))

    @router.post("/target/read", openapi_extra=describe(answers.Filled, 409, 503, bodies=[ReadBody]))
    @turns.holds
    async def read(request: Request) -> Response:
        """Have the server read tensors of an update from its files."""
        asked = await body_of(service, request, ReadBody)
        return filled(asked.version, await control.fill(str(asked.version), sources.from_disk(asked.path)))

    @router.post("/target/shared", openapi_extra=describe(answers.Filled, 409, 503, bodies=[SharedBody]))
    @turns.holds
    async def shared(request: Request) -> Response:
        """Have the server read tensors of an update from shared memory of its machine."""
        asked = await body_of(service, request, SharedBody)
        source = sources.from_shared_memory(asked.segment, asked.num_bytes)
        return filled(asked.version, await control.fill(str(asked.version), source))

    @router.post("/target/receive", openapi_extra=describe(answers.Filled, 409, 503, bodies=[ReceiveBody]))
    @turns.holds
    async def receive(request: Request) -> Response:
        """Have the server take tensors of an update that are broadcast in a group."""
        asked = await body_of(service, request, ReceiveBody, TENSORS_BYTES)
        tensors = [(each.name, each.dtype, each.shape) for each in asked.tensors]
        source = sources.from_group(asked.group, tensors, asked.buffer_bytes)
        return filled(asked.version, await control.fill(str(asked.version), source))

    @router.post("/target/finish", openapi_extra=describe(answers.Updated, 409, 503, bodies=[FinishBody]))
    @turns.holds
    async def finish(request: Request) -> Response:
        """Serve with the new weights, all of them, from now on."""
        asked = await body_of(service, request, FinishBody, TENSORS_BYTES)
        report = await control.finish_update(
            str(asked.version), asked.keep_rest, asked.checksums, lora_scale=asked.lora_scale
        )
        return JSONBody(msgspec.structs.asdict(report) | {"version": asked.version})

    @router.post("/target/cancel", openapi_extra=describe(answers.Update, 503, bodies=[UpdateBody]))
    @turns.holds
    async def cancel(request: Request) -> Response:
        """Give an update up; the old weights go on serving."""
        asked = await body_of(service, request, UpdateBody)
        await control.cancel_update(str(asked.version))
        return JSONBody({"version": asked.version})

    @router.get("/target/checksums", openapi_extra=describe(answers.WeightChecksums, 503))
    async def checksums() -> Response:
        """Checksums of the weights that serve."""
        found = await control.checksums()
        return JSONBody({"version": control.weight_version, "checksums": found})

    @router.post("/groups/join", openapi_extra=describe(answers.TrainersGroup, 503, bodies=[JoinBody]))
    async def join(request: Request) -> Response:
        """Join a group of processes of torch.distributed, in which a trainer broadcasts weights."""
        asked = await body_of(service, request, JoinBody)
        await control.join_group(**asked.model_dump())
        return JSONBody({"name": asked.name})

    @router.post("/groups/leave", openapi_extra=describe(answers.TrainersGroup, 503, bodies=[GroupBody]))
    async def leave(request: Request) -> Response:
        """Leave a group."""
        asked = await body_of(service, request, GroupBody)
        await control.leave_group(asked.name)
        return JSONBody({"name": asked.name})

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
