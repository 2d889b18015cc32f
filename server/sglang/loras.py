"""Routes that load LoRAs beside the model and unload them; a face of server/adapters.py."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from slipstream.server.http.json_response import JSONBody
from slipstream.server.service import Service
from slipstream.server.sglang import answers
from slipstream.server.sglang.asking import body_of, described, shared_handles, telling_failures
from slipstream.server.sglang.control_schema import SGLangLoraBody, SGLangLoraNameBody, SGLangSharedLoraBody


def add_lora_routes(router: APIRouter, service: Service) -> None:
    adapters = service.adapters

    def loaded() -> Response:
        return JSONBody({"success": True, "error_message": "", "loaded_adapters": adapters.folders})

    @router.post("/load_lora_adapter", openapi_extra=described(SGLangLoraBody, answer=answers.SGLangLoras))
    @telling_failures
    async def load(request: Request) -> Response:
        """Answer to the name of a LoRA with it."""
        asked = await body_of(service, request, SGLangLoraBody)
        service.require_ready()
        await adapters.load(asked.lora_name, asked.lora_path, replace=False, pinned=bool(asked.pinned))
        return loaded()

    @router.post(
        "/load_lora_adapter_from_tensors", openapi_extra=described(SGLangSharedLoraBody, answer=answers.SGLangLoras)
    )
    @telling_failures
    async def load_shared(request: Request) -> Response:
        """The same with matrices that another process of this machine shares; one of that name is replaced."""
        asked = await body_of(service, request, SGLangSharedLoraBody)
        service.require_ready()
        pickled = shared_handles(*asked.tensors)
        await adapters.load_shared(asked.lora_name, asked.config_dict, pickled, pinned=bool(asked.pinned))
        return loaded()

    @router.post("/unload_lora_adapter", openapi_extra=described(SGLangLoraNameBody, answer=answers.SGLangLoras))
    @telling_failures
    async def unload(request: Request) -> Response:
        """Answer to the name of a LoRA no longer."""
        asked = await body_of(service, request, SGLangLoraNameBody)
        service.require_ready()
        await adapters.unload(asked.lora_name)
        return loaded()
