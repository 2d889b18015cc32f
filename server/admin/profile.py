"""POST /debug/profile: what steps of the engine spend their time with."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from slipstream.engine.errors import SlipstreamError
from slipstream.engine.operations import Profile
from slipstream.server.asked import body_of
from slipstream.server.errors import ConflictError, UnavailableError
from slipstream.server.http.body import Body
from slipstream.server.http.description import Answer, describe
from slipstream.server.responses import LargeResponse
from slipstream.server.service import Service

RETRY_S = 5
STEPS_HEADER = "x-slipstream-steps"


class ProfileBody(Body):
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 60.0
    shapes: bool = False


class ChromeTrace(Answer):
    """As chrome://tracing and Perfetto read it."""

    model_config = ConfigDict(extra="allow")

    traceEvents: list[dict[str, Any]]  # noqa: N815 - its name in the format


DESCRIBED = (ProfileBody, ChromeTrace)


def profile_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    @router.post(
        "/debug/profile",
        openapi_extra=describe(ChromeTrace, 409, 429, 503, bodies=[ProfileBody]),
    )
    async def profile(request: Request) -> Response:
        """Profile the next steps of the engine, and answer with a trace of them."""
        asked = await body_of(service, request, ProfileBody)
        if not service.is_loaded or service.engine.failure is not None:
            raise UnavailableError("there is no engine to profile", retry_after_s=RETRY_S)
        folder = Path(tempfile.mkdtemp(prefix="slipstream-profile-"))
        try:
            path = folder / "trace.json"
            try:
                steps = await service.engine.call(Profile(str(path), asked.steps, asked.timeout_s, asked.shapes))
            except SlipstreamError as error:
                raise ConflictError(str(error), code="no_profile") from None
            trace = await asyncio.to_thread(path.read_bytes)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        response = LargeResponse(service, trace)
        response.headers[STEPS_HEADER] = str(steps)
        return response

    return router
