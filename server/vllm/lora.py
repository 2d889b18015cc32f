"""LoRAs that a trainer sends: there is one policy, so the one that came last serves, for all names of the model."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from slipstream.server.description import describe
from slipstream.server.errors import ModelNotFoundError
from slipstream.server.service import Service
from slipstream.server.vllm.asked import body_of
from slipstream.server.vllm.control_schema import LoraBody, LoraNameBody


class Adapters:
    """Names that LoRAs brought, beside those of the model."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def serve(self, name: str) -> None:
        """The model answers to this name, too, which is that of the LoRA that serves now."""
        if name not in self._service.adapter_names:
            self._service.adapter_names.append(name)

    def forget(self, name: str) -> None:
        """Raises ModelNotFoundError unless it is one."""
        if name not in self._service.adapter_names:
            raise ModelNotFoundError(f"there is no LoRA {name[:200]!r} here", param="lora_name")
        self._service.adapter_names.remove(name)


def lora_router(service: Service, adapters: Adapters) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    async def load(request: Request) -> Response:
        """Serve with a LoRA in a folder of this machine, under its name too."""
        asked = await body_of(service, request, LoraBody)
        await service.control.update_from_disk(asked.lora_path, asked.lora_name, is_lora=True)
        adapters.serve(asked.lora_name)
        return Response(f"Success: LoRA adapter '{asked.lora_name}' added successfully.", media_type="text/plain")

    told = describe("text/plain", 409, 503, bodies=[LoraBody])
    router.post("/v1/load_lora_adapter", openapi_extra=told)(load)
    router.post("/skyrl/v1/load_lora_adapter", openapi_extra=told)(load)

    @router.post("/v1/unload_lora_adapter", openapi_extra=describe("text/plain", 404, 409, 503, bodies=[LoraNameBody]))
    async def unload(request: Request) -> Response:
        """Answer to the name of a LoRA no longer."""
        asked = await body_of(service, request, LoraNameBody)
        service.require_ready()
        adapters.forget(asked.lora_name)
        return Response(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.", media_type="text/plain")

    return router
