"""The control routes of ``trl vllm-serve``, whose paths end with a slash. The admin key opens them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from slipstream.server.http.body import Body
from slipstream.server.http.description import describe
from slipstream.server.http.json_response import JSONBody
from slipstream.server.service import Service
from slipstream.server.vllm import control_schema as schema
from slipstream.server.vllm.asked import body_of
from slipstream.server.vllm.control_answers import Done, WorldSize
from slipstream.server.vllm.schema import NoBody
from slipstream.server.vllm.transfer import TRL_GROUP, Transfer


def told(body: type[Body] = NoBody) -> dict[str, Any]:
    return describe(Done, 409, 503, bodies=[body])


def done(message: str) -> Response:
    return JSONBody({"message": message})


def trl_control_router(service: Service, transfer: Transfer) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    control = service.control
    turns = control.turns

    @router.get("/get_world_size/", openapi_extra=describe(WorldSize, 503))
    async def get_world_size() -> Response:
        """How many processes a trainer sends weights to."""
        service.require_ready()
        return JSONBody({"world_size": 1})

    @router.post("/init_communicator/", openapi_extra=told(schema.TrlCommunicatorBody))
    @turns.takes
    async def init_communicator(request: Request) -> Response:
        """Begin to wait for a trainer at a port; it joins after this is answered."""
        asked = await body_of(service, request, schema.TrlCommunicatorBody)
        service.require_ready()
        await transfer.join_behind(asked.host, asked.port, asked.world_size)
        return done("Request received, initializing communicator")

    @router.post("/update_named_param/", openapi_extra=told(schema.TrlTensorBody))
    @turns.holds
    async def update_named_param(request: Request) -> Response:
        """Begin to take a tensor, which the trainer sends after this is answered."""
        with control.part_of_update():
            asked = await body_of(service, request, schema.TrlTensorBody)
            service.require_ready()
            transfer.receive_behind([(asked.name, asked.dtype, asked.shape)])
        return done("Request received, updating named parameter")

    @router.post("/batch_update_named_params/", openapi_extra=told(schema.TrlTensorsBody))
    @turns.holds
    async def batch_update_named_params(request: Request) -> Response:
        """Begin to take tensors, which the trainer sends after this is answered."""
        with control.part_of_update():
            asked = await body_of(service, request, schema.TrlTensorsBody)
            service.require_ready()
            transfer.receive_behind([(param.name, param.dtype, param.shape) for param in asked.params])
        return done("Request received, updating named parameters")

    @router.post("/reset_prefix_cache/", openapi_extra=told())
    @turns.spares
    async def reset_prefix_cache(request: Request) -> Response:
        """Serve with the weights that have come, and forget what has been computed of prompts."""
        await body_of(service, request, NoBody)
        await transfer.settle()
        success = await control.flush_prefix_cache()
        return done(f"Request received, resetting prefix cache status: {success}")

    @router.post("/close_communicator/", openapi_extra=told())
    @turns.holds
    async def close_communicator(request: Request) -> Response:
        """Leave the group of a trainer."""
        await body_of(service, request, NoBody)
        await transfer.leave(TRL_GROUP)
        return done("Request received, closing communicator")

    return router
