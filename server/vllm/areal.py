"""The routes that AReaL adds to vLLM's server to control it. The admin key opens them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from slipstream.server.http.body import Body
from slipstream.server.http.description import describe
from slipstream.server.http.json_response import JSONBody
from slipstream.server.service import Service
from slipstream.server.vllm import control_schema as schema
from slipstream.server.vllm.asked import body_of
from slipstream.server.vllm.control_answers import Succeeded
from slipstream.server.vllm.schema import NoBody
from slipstream.server.vllm.transfer import Announced, Transfer


def told(body: type[Body] = NoBody) -> dict[str, Any]:
    return describe(Succeeded, 409, 503, bodies=[body])


def success(message: str) -> Response:
    return JSONBody({"success": True, "message": message})


def areal_router(service: Service, transfer: Transfer) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    control, adapters = service.control, service.adapters
    turns = control.turns

    @router.post("/areal_pause_generation", openapi_extra=told())
    async def pause(request: Request) -> Response:
        """End all requests, and let none begin until generation is continued."""
        await body_of(service, request, NoBody)
        await control.pause("abort", settle=True)
        await control.flush_prefix_cache()
        return success("Generation paused and all requests aborted")

    @router.post("/areal_continue_generation", openapi_extra=told())
    @turns.spares
    async def go_on(request: Request) -> Response:
        """Let requests begin again, with the weights that have come."""
        await body_of(service, request, NoBody)
        await transfer.finish_if_begun()
        await control.resume()
        return success("Generation continued")

    @router.post("/areal_update_weights", openapi_extra=told(schema.ArealUpdateBody))
    async def update(request: Request) -> Response:
        """Serve with the weights in a folder of this machine; requests that have begun end."""
        asked = await body_of(service, request, schema.ArealUpdateBody)
        await control.update_from_disk(asked.model_path, mode=transfer.mode)
        return success("Weights updated")

    @router.post("/areal_update_weights_lora", openapi_extra=told(schema.ArealLoraBody))
    async def update_lora(request: Request) -> Response:
        """Serve with a LoRA in a folder of this machine, under its name too; requests that have begun end."""
        asked = await body_of(service, request, schema.ArealLoraBody)
        adapters.require_mergeable(asked.lora_name)
        await control.update_from_disk(asked.lora_model_path, asked.lora_name, transfer.mode, is_lora=True)
        adapters.merged(asked.lora_name)
        return success("LoRA updated")

    @router.post("/areal_init_weights_update_group", openapi_extra=told(schema.ArealGroupBody))
    @turns.takes
    async def init_group(request: Request) -> Response:
        """Join the group of a trainer."""
        asked = await body_of(service, request, schema.ArealGroupBody)
        port = int(asked.master_port)
        await transfer.join(
            asked.group_name, asked.master_address, port, asked.world_size, asked.rank_offset, asked.backend
        )
        return success("Group joined")

    @router.post("/areal_set_update_weight_meta", openapi_extra=told(schema.ArealTensorsBody))
    @turns.holds
    async def announce(request: Request) -> Response:
        """Say which tensors come next."""
        with control.part_of_update():
            asked = await body_of(service, request, schema.ArealTensorsBody)
            service.require_ready()
        transfer.announced = announced(asked)
        return success("Tensors announced")

    @router.post("/areal_update_weights_xccl", openapi_extra=told())
    @turns.holds
    async def update_from_group(request: Request) -> Response:
        """Take the tensors that were announced; they serve when all have come."""
        await body_of(service, request, NoBody)
        with control.part_of_update():
            await transfer.receive_announced()
        return success("Weights received")

    @router.post("/areal_set_update_weight_meta_lora", openapi_extra=told(schema.ArealLoraTensorsBody))
    async def announce_lora(request: Request) -> Response:
        """Say which matrices of a LoRA come next."""
        asked = await body_of(service, request, schema.ArealLoraTensorsBody)
        service.require_ready()
        transfer.announced = announced(asked)
        return success("LoRA announced")

    @router.post("/areal_update_weights_lora_xccl", openapi_extra=told(schema.ArealLoraTensorsBody))
    async def update_lora_from_group(request: Request) -> Response:
        """Take the LoRA that was announced, and serve with it, under its name too."""
        asked = await body_of(service, request, schema.ArealLoraTensorsBody)
        adapters.require_mergeable(asked.lora_name)
        await transfer.receive_lora(asked.lora_name, asked.lora_alpha / asked.lora_rank)
        adapters.merged(asked.lora_name)
        return success("LoRA received")

    return router


def announced(asked: schema.ArealTensorsBody) -> Announced:
    return Announced(asked.group_name, list(zip(asked.names, asked.dtypes, asked.shapes, strict=True)))
