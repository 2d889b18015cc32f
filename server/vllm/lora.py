"""LoRAs from folders of this machine, beside the model."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from slipstream.server.http.description import describe
from slipstream.server.service import Service
from slipstream.server.vllm.asked import body_of
from slipstream.server.vllm.control_schema import LoraBody, LoraNameBody


def lora_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    adapters = service.adapters

    async def load(request: Request) -> Response:
        """Answer to the name of a LoRA with it."""
        asked = await body_of(service, request, LoraBody)
        service.require_ready()
        await adapters.load(asked.lora_name, asked.lora_path, bool(asked.load_inplace))
        return Response(f"Success: LoRA adapter '{asked.lora_name}' added successfully.", media_type="text/plain")

    told = describe("text/plain", 409, 503, bodies=[LoraBody])
    router.post("/v1/load_lora_adapter", openapi_extra=told)(load)
    router.post("/skyrl/v1/load_lora_adapter", openapi_extra=told)(load)

    @router.post("/v1/unload_lora_adapter", openapi_extra=describe("text/plain", 404, 409, 503, bodies=[LoraNameBody]))
    async def unload(request: Request) -> Response:
        """Answer to the name of a LoRA no longer."""
        asked = await body_of(service, request, LoraNameBody)
        service.require_ready()
        await adapters.unload(asked.lora_name)
        return Response(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.", media_type="text/plain")

    return router
