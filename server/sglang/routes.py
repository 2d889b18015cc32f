"""The routes of SGLang's dialect: those that generate and tell, and those that control the server."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from slipstream.engine.messages import NewRequest, SamplingParams
from slipstream.server.errors import ApiError, InvalidRequestError, OverloadedError
from slipstream.server.http.description import describe, parameter
from slipstream.server.http.json_response import JSONBody
from slipstream.server.rollout.refused import refusing_router
from slipstream.server.service import Service
from slipstream.server.sglang import answers, info
from slipstream.server.sglang.control import add_control_routes
from slipstream.server.sglang.control_schema import BODIES as CONTROL_BODIES
from slipstream.server.sglang.generate import generate
from slipstream.server.sglang.loras import add_lora_routes
from slipstream.server.sglang.refused import REFUSED
from slipstream.server.sglang.schema import SGLangGenerateBody, SGLangSamplingParams
from slipstream.server.sglang.updates import Updates
from slipstream.server.sglang.weights import add_weight_routes

DESCRIBED = (SGLangGenerateBody, SGLangSamplingParams, *CONTROL_BODIES, *answers.ANSWERS)
BUSY = (429, 503, 504)
HEALTH_PATH = "/health_generate"
HEALTH_S = 20.0
"""How long a token may take."""
LOADS = (
    parameter("include", type="string", pattern=f"^(({'|'.join(info.SECTIONS)})(,({'|'.join(info.SECTIONS)}))*)?$"),
    parameter("dp_rank", type="integer", enum=[0]),
    parameter("format", type="string", enum=["json"]),
)


def sglang_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    @router.post(
        "/generate",
        openapi_extra=describe(
            answers.SGLangAnswers, *BUSY, bodies=[SGLangGenerateBody], body_required=True, stream=answers.SGLangAnswer
        ),
    )
    async def generate_for_sglang(request: Request) -> Response:
        """Continue texts or token ids."""
        return await generate(service, request)

    async def server_info() -> Response:
        service.require_ready()
        return JSONBody(info.server_info(service))

    async def model_info() -> Response:
        service.require_ready()
        return JSONBody(info.model_info(service))

    for path in ("/server_info", "/get_server_info"):
        router.get(path, openapi_extra=describe(answers.SGLangServerInfo, 503), summary="What this server is")(
            server_info
        )
    for path in ("/model_info", "/get_model_info"):
        router.get(path, openapi_extra=describe(answers.SGLangModelInfo, 503), summary="What it serves")(model_info)

    @router.get("/get_weight_version", openapi_extra=describe(answers.SGLangVersion, 503))
    @router.get("/weight_version", openapi_extra=describe(answers.SGLangVersion, 503))
    async def weight_version() -> Response:
        """What the weights are called that serve."""
        service.require_ready()
        return JSONBody({"weight_version": service.control.weight_version})

    @router.get("/v1/loads", openapi_extra=describe(answers.SGLangLoads, 503, query=LOADS))
    async def loads(request: Request) -> Response:
        """What there is to do."""
        service.require_ready()
        query = request.query_params
        if query.get("dp_rank", "0") != "0":
            raise InvalidRequestError("dp_rank: there is rank 0 only", param="dp_rank")
        include = [name.strip() for name in query.get("include", "").split(",") if name.strip()]
        if query.get("format", "json") != "json":
            raise InvalidRequestError("format: only json; for Prometheus there is /metrics", param="format")
        return JSONBody(info.loads_answer(service, include))

    @router.get("/get_load", openapi_extra=describe(answers.SGLangOldLoads, 503))
    async def load() -> Response:
        """The same for older routers."""
        service.require_ready()
        return JSONBody(info.old_load(service))

    @router.get(HEALTH_PATH, openapi_extra=describe(answers.SGLangHealth, 503, errors=answers.SGLangHealth))
    async def health() -> Response:
        """200 if a token can be generated, or the server is at work or paused."""
        status, body = service.ready()
        if status == 200 and body["status"] == "ok" and not service.engine.num_open and not await one_token(service):
            status, body = 503, {"status": "stalled", "reason": f"no token came in {HEALTH_S:g} s"}
        return JSONBody(body, status)

    return router


def control_router(service: Service) -> APIRouter:
    """Those behind the admin key."""
    router = APIRouter(default_response_class=Response)
    updates = Updates(service.control)
    add_control_routes(router, service, updates)
    add_weight_routes(router, service, updates)
    add_lora_routes(router, service)
    return router


def refused_router(service: Service) -> APIRouter:
    """What is not here: those who may control a server are told what to use instead."""
    return refusing_router(service.config.max_body_bytes, REFUSED)


async def one_token(service: Service) -> bool:
    """Whether the engine generates one."""
    request = NewRequest(
        request_id=service.engine.next_request_id(),
        prompt=[0],
        params=SamplingParams(max_tokens=1, temperature=0.0),
        remember=False,
    )
    try:
        [stream] = service.submit([request])
    except OverloadedError:
        return True  # it is at work
    except ApiError:
        return False
    try:
        async with asyncio.timeout(HEALTH_S):
            return (await stream.next())[-1].finish_reason == "length"
    except TimeoutError:
        stream.abort()
        return False
