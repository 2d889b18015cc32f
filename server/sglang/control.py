"""Routes that pause the server, end requests and give memory back; a face of server/rollout/control.py."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from slipstream.engine.operations import PauseMode
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.description import describe, parameter
from slipstream.server.http.json_response import JSONBody
from slipstream.server.service import Service
from slipstream.server.sglang import answers
from slipstream.server.sglang.asking import body_of
from slipstream.server.sglang.control_schema import (
    SGLangAbortBody,
    SGLangContinueBody,
    SGLangEmptyBody,
    SGLangMemoryBody,
    SGLangPauseBody,
)
from slipstream.server.sglang.updates import Updates

MODES: dict[str, PauseMode] = {"abort": "abort", "retract": "recompute", "in_place": "keep"}
FLUSH_AGAIN_S = 0.05
TIMEOUT = parameter("timeout", type="number", minimum=0)


def add_control_routes(router: APIRouter, service: Service, updates: Updates) -> None:
    control = service.control

    @router.post(
        "/pause_generation",
        openapi_extra=describe(answers.SGLangStatus, 503, bodies=[SGLangPauseBody]),
    )
    async def pause(request: Request) -> Response:
        """Let no request begin, and none go on but as the mode says; answered when nothing runs any more."""
        mode = (await body_of(service, request, SGLangPauseBody)).mode or "abort"
        await control.pause(MODES[mode], settle=True)
        return JSONBody({"status": "ok", "message": "Generation paused successfully."})

    @router.post(
        "/continue_generation",
        openapi_extra=describe(answers.SGLangStatus, 409, 503, bodies=[SGLangContinueBody]),
    )
    @control.turns.spares
    async def go_on(request: Request) -> Response:
        """End a pause, with the weights that have come meanwhile."""
        await body_of(service, request, SGLangContinueBody)
        given_up = await updates.finish()
        await control.resume()
        message = f"Generation continued; {given_up}." if given_up else "Generation continued successfully."
        return JSONBody({"status": "ok", "message": message})

    @router.post("/abort_request", openapi_extra=describe(answers.SGLangAborted, 503, bodies=[SGLangAbortBody]))
    async def abort(request: Request) -> Response:
        """End requests; each is answered with what it has said."""
        asked = await body_of(service, request, SGLangAbortBody)
        service.require_ready()
        names = None if asked.abort_all else matching(asked.rid or "", list(control.open_requests))
        return JSONBody({"aborted": await control.abort(names)})

    @control.turns.spares
    async def flush(request: Request) -> Response:
        wait_s = timeout_of(request)
        await updates.finish()
        deadline = time.monotonic() + wait_s
        while not await control.flush_prefix_cache():
            if time.monotonic() > deadline:
                raise InvalidRequestError(
                    "the cache is flushed for what comes, but requests that run hold some of it; abort them or wait",
                    code="cache_in_use",
                )
            await asyncio.sleep(FLUSH_AGAIN_S)
        return PlainTextResponse("Cache flushed.\n")

    @router.get("/flush_cache", openapi_extra=describe("text/plain", 409, 503, query=[TIMEOUT]))
    async def flush_by_get(request: Request) -> Response:
        """Forget what was computed of prompts; 400 while requests hold some of it."""
        return await flush(request)

    @router.post(
        "/flush_cache",
        openapi_extra=describe("text/plain", 409, 503, bodies=[SGLangEmptyBody], query=[TIMEOUT]),
    )
    async def flush_by_post(request: Request) -> Response:
        """The same."""
        await body_of(service, request, SGLangEmptyBody)
        return await flush(request)

    @router.post(
        "/release_memory_occupation",
        openapi_extra=describe(answers.SGLangStatus, 503, bodies=[SGLangMemoryBody]),
    )
    async def release(request: Request) -> Response:
        """Give memory back to the system; requests wait until it is taken again."""
        tags = tags_of(await body_of(service, request, SGLangMemoryBody))
        await control.release_memory(tags, mode="recompute")
        return JSONBody({"status": "ok", "message": f"Released: {', '.join(tags)}."})

    @router.post(
        "/resume_memory_occupation",
        openapi_extra=describe(answers.SGLangStatus, 503, bodies=[SGLangMemoryBody]),
    )
    async def take_back(request: Request) -> Response:
        """Take memory again that was released."""
        tags = tags_of(await body_of(service, request, SGLangMemoryBody))
        await control.resume_memory(tags)
        return JSONBody({"status": "ok", "message": f"Resumed: {', '.join(tags)}."})


def matching(rid: str, names: list[str]) -> list[str]:
    """The requests that an id ends: if it is one's own, or begins those of a batch, all that begin with it."""
    if not rid or not any(name in (rid, f"{rid}_0") for name in names):
        return []
    return [name for name in names if name.startswith(rid)]


def tags_of(asked: SGLangMemoryBody) -> list[Literal["kv_cache", "weights"]]:
    """Recorded graphs have no memory of their own here."""
    tags = asked.tags or ["kv_cache", "weights"]
    return [tag for tag in tags if tag != "cuda_graph"]


def timeout_of(request: Request) -> float:
    text = request.query_params.get("timeout", "0")
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise InvalidRequestError(f"timeout: seconds, not {text[:60]!r}", param="timeout")
    return found
