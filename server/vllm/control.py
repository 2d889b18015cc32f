"""The routes by which a trainer controls vLLM's server. The admin key opens them; see gate.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from slipstream.engine.operations import MemoryTag
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body, parse
from slipstream.server.http.description import Answer, describe, parameter
from slipstream.server.http.json_response import JSONBody
from slipstream.server.rollout import refused
from slipstream.server.rollout.control import ALL_MEMORY
from slipstream.server.service import Service
from slipstream.server.vllm import control_answers as answers
from slipstream.server.vllm import control_schema as schema
from slipstream.server.vllm.areal import areal_router
from slipstream.server.vllm.asked import PAUSES, body_of, flag, one_of, words_of
from slipstream.server.vllm.lora import lora_router
from slipstream.server.vllm.prepare import UNKNOWN
from slipstream.server.vllm.refused import REFUSED
from slipstream.server.vllm.schema import NoBody
from slipstream.server.vllm.transfer import Transfer
from slipstream.server.vllm.trl_control import trl_control_router

BODIES: tuple[type[Body], ...] = (*schema.BODIES, NoBody)
DESCRIBED = (*BODIES, *answers.ANSWERS, *refused.DESCRIBED)
REFUSALS = (409, 503)
encode = msgspec.json.Encoder().encode
WORLD_SIZE = 1
"""Processes that a trainer sends weights to."""
SKYRL_START = "skyrl_start_weight_update"
LEVELS = ("0", "1", "2")
SCHEDULING = "scheduling"
"""What vLLM calls generating when it says what is to wake up."""
MODE = parameter("mode", type="string", enum=list(PAUSES))
LEVEL = parameter("level", type="integer", enum=list(map(int, LEVELS)))
TAGS = parameter("tags", type="array", items={"type": "string", "enum": [*ALL_MEMORY, SCHEDULING]})


def told(answer: type[Answer], body: type[Body] = NoBody, *query: dict[str, Any]) -> dict[str, Any]:
    """A control route in the OpenAPI document."""
    return describe(answer, *REFUSALS, bodies=[body], query=query)


def a_flag(name: str) -> dict[str, Any]:
    return parameter(name, type="boolean")


def control_routers(service: Service) -> list[APIRouter]:
    """Side by side, so that the gate sees every route of theirs."""
    transfer = Transfer(service)
    return [
        pause_router(service),
        memory_router(service),
        update_router(service, transfer),
        lora_router(service),
        areal_router(service, transfer),
        trl_control_router(service, transfer),
        refused.refusing_router(service.config.max_body_bytes, REFUSED),
    ]


def pause_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    control = service.control

    query = MODE, a_flag("clear_cache"), a_flag("wait_for_inflight_requests")

    @router.post("/pause", openapi_extra=told(answers.PauseStatus, NoBody, *query))
    async def pause(request: Request) -> Response:
        """Let no request begin, and none go on but as the mode says, until it is resumed."""
        mode = one_of(request, "mode", PAUSES, "abort")
        if flag(request, "wait_for_inflight_requests", False):  # how the mode was said before there were modes
            mode = "wait"
        clear = flag(request, "clear_cache", True)
        await body_of(service, request, NoBody)
        await control.pause(mode, settle=True)
        if clear and mode != "keep":
            await control.flush_prefix_cache()
        return JSONBody({"status": "paused"})

    @router.post("/resume", openapi_extra=told(answers.PauseStatus))
    async def resume(request: Request) -> Response:
        """End a pause."""
        await body_of(service, request, NoBody)
        await control.resume()
        return JSONBody({"status": "resumed"})

    @router.get("/is_paused", openapi_extra=describe(answers.IsPaused, 503))
    async def is_paused() -> Response:
        """Whether it is paused."""
        service.require_ready()
        return JSONBody({"is_paused": control.paused})

    @router.post("/abort_requests", openapi_extra=told(answers.VllmAborted, schema.VllmAbortBody))
    async def abort_requests(request: Request) -> Response:
        """End requests, or all of them; they answer what they have."""
        names = (await body_of(service, request, schema.VllmAbortBody)).request_ids
        service.require_ready()
        return JSONBody({"status": "aborted", "aborted": await control.abort(names or None)})

    @router.post("/inference/v1/abort_requests", openapi_extra=told(answers.VllmAborted, schema.VllmAbortBody))
    async def abort_these(request: Request) -> Response:
        """End requests."""
        names = (await body_of(service, request, schema.VllmAbortBody)).request_ids
        if names is None:
            raise InvalidRequestError("missing field 'request_ids'", param="request_ids")
        service.require_ready()
        return JSONBody({"status": "aborted", "aborted": await control.abort(names)})

    @router.get("/get_world_size", openapi_extra=describe(answers.WorldSize, 503))
    async def get_world_size() -> Response:
        """How many processes a trainer sends weights to."""
        service.require_ready()
        return JSONBody({"world_size": WORLD_SIZE})

    return router


def memory_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    control = service.control

    @router.post(
        "/reset_prefix_cache",
        openapi_extra=told(answers.CacheReset, schema.ResetCacheBody, a_flag("reset_running_requests")),
    )
    async def reset_prefix_cache(request: Request) -> Response:
        """Forget what has been computed of prompts."""
        running = flag(request, "reset_running_requests", False)
        running |= bool((await body_of(service, request, schema.ResetCacheBody)).reset_running_requests)
        if not running:
            return JSONBody({"success": await control.flush_prefix_cache()})
        async with control.halted("recompute"):
            return JSONBody({"success": await control.flush_prefix_cache()})

    @router.post("/reload_weights", openapi_extra=told(answers.WeightsReloaded))
    async def reload_weights(request: Request) -> Response:
        """Serve with the weights of the model's files again, as prime-rl asks when a training begins anew."""
        await body_of(service, request, NoBody)
        await control.reload_weights()
        return JSONBody({"status": "ok"})

    @router.post("/sleep", openapi_extra=told(answers.SleepStatus, NoBody, MODE, LEVEL))
    async def sleep(request: Request) -> Response:
        """Give memory back: at level 1 weights are kept elsewhere, at level 2 they are discarded."""
        level = int(one_of(request, "level", LEVELS, "1"))
        mode = one_of(request, "mode", PAUSES, "abort")
        await body_of(service, request, NoBody)
        if level == 0:
            await control.pause(mode, settle=True)
        else:
            await control.release_memory(ALL_MEMORY, keep_weights=level == 1, mode=mode)
        return JSONBody({"status": "sleeping", "level": level})

    @router.post("/release_kv_cache_memory", openapi_extra=told(answers.CacheReleased))
    async def release_kv_cache_memory(request: Request) -> Response:
        """Give the memory of keys and values back."""
        await body_of(service, request, NoBody)
        await control.release_memory(["kv_cache"], mode="keep")
        return JSONBody({"status": "kv_cache_released"})

    @router.post("/wake_up", openapi_extra=told(answers.WakeStatus, NoBody, TAGS))
    async def wake_up(request: Request) -> Response:
        """Take memory again; when all is back, generate."""
        tags = words_of(request, "tags")
        await body_of(service, request, NoBody)
        if tags is None or set(tags) - {SCHEDULING}:
            await control.resume_memory(ALL_MEMORY if tags is None else memory_tags(tags))
        awake = not control.released
        if awake and control.paused:
            await control.resume()
        return JSONBody({"status": "awake" if awake else "sleeping", "tags": tags})

    @router.get("/is_sleeping", openapi_extra=describe(answers.IsSleeping, 503))
    async def is_sleeping() -> Response:
        """Whether nothing is generated, at any level."""
        service.require_ready()
        return JSONBody({"is_sleeping": control.paused or bool(control.released)})

    return router


def memory_tags(words: list[str]) -> list[MemoryTag]:
    """Raises InvalidRequestError for what is none."""
    if unknown := set(words) - {*ALL_MEMORY, SCHEDULING}:
        raise InvalidRequestError(
            f"tags: {', '.join((*ALL_MEMORY, SCHEDULING))}, not {min(unknown)[:60]!r}", param="tags"
        )
    return [tag for tag in ALL_MEMORY if tag in words]


def update_router(service: Service, transfer: Transfer) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    control = service.control
    turns = control.turns

    @router.post("/init_weight_transfer_engine", openapi_extra=told(answers.Done, schema.InitBody))
    @turns.takes
    async def init_weight_transfer_engine(request: Request) -> Response:
        """Join the group of a trainer."""
        await transfer.init((await body_of(service, request, schema.InitBody)).init_info)
        return JSONBody({"message": "Weight transfer initialized"})

    @router.post("/shutdown_weight_transfer_engine", openapi_extra=told(answers.Done))
    @turns.holds
    async def shutdown_weight_transfer_engine(request: Request) -> Response:
        """Leave the group of a trainer."""
        await body_of(service, request, NoBody)
        await transfer.shutdown()
        return JSONBody({"message": "Weight transfer shut down"})

    @router.post("/start_weight_update", openapi_extra=told(answers.Done))
    @turns.begins
    async def start_weight_update(request: Request) -> Response:
        """Begin an update of the weights, which serves from its end on."""
        await body_of(service, request, NoBody)
        await transfer.start()
        return JSONBody({"message": "Weight update started"})

    @router.post("/start_draft_weight_update", openapi_extra=told(answers.Done))
    async def start_draft_weight_update(request: Request) -> Response:
        """Refused: drafters learn by themselves, or are imported by the admin API."""
        await body_of(service, request, NoBody)
        raise InvalidRequestError(
            "a trainer sends no drafter to this server: it follows the policy by itself (--evolve idle), or comes from "
            "a folder with POST /admin/v1/drafters/import",
            code="unsupported_parameter",
        )

    @router.post("/update_weights", openapi_extra=told(answers.Done, schema.UpdateWeightsBody))
    @turns.holds
    async def update_weights(request: Request) -> Response:
        """Take tensors of an update."""
        with control.part_of_update():
            asked = await body_of(service, request, schema.UpdateWeightsBody)
            if asked.weight_dir is None:
                await transfer.update(asked.infos)
        if asked.weight_dir is not None:
            await control.update_from_disk(asked.weight_dir)
        return JSONBody({"message": "Weights updated"})

    @router.post("/finish_weight_update", openapi_extra=told(answers.Done, schema.VllmFinishBody))
    @turns.holds
    async def finish_weight_update(request: Request) -> Response:
        """Serve with the new weights from now on."""
        await transfer.finish((await body_of(service, request, schema.VllmFinishBody)).weight_version)
        return JSONBody({"message": "Weight update finished"})

    @router.post("/update_weight_version", openapi_extra=told(answers.VersionSet, schema.WeightVersionBody))
    async def update_weight_version(request: Request) -> Response:
        """Call the weights that serve by another name."""
        asked = await body_of(service, request, schema.WeightVersionBody)
        service.require_ready()
        if asked.abort_all_requests:
            await control.abort()
        control.set_weight_version(asked.new_version)
        message = f"The weights are version {asked.new_version}"
        return JSONBody({"success": True, "message": message, "new_version": asked.new_version})

    @router.get("/weight_info", openapi_extra=describe(answers.WeightInfo, 503))
    async def weight_info() -> Response:
        """What the weights that serve are called."""
        service.require_ready()
        return JSONBody({"weight_version": control.weight_version})

    @router.post("/weight_checker", openapi_extra=told(answers.WeightCheck, schema.CheckWeightsBody))
    async def weight_checker(request: Request) -> Response:
        """Checksums of the weights that serve, or how they differ from those given."""
        asked = await body_of(service, request, schema.CheckWeightsBody)
        found = await control.checksums()
        if asked.baseline is None or asked.action == "checksum":
            return JSONBody({"checksums": found})
        before = asked.baseline
        mismatches = sorted(name for name in found | before if found.get(name) != before.get(name))
        return JSONBody({"match": not mismatches, "mismatches": mismatches})

    @router.post("/collective_rpc", openapi_extra=told(answers.CallResults, schema.CallBody))
    async def collective_rpc(request: Request) -> Response:
        """Some methods of vLLM's workers, by which SkyRL sends weights."""
        asked = await body_of(service, request, schema.CallBody)
        methods = calls(transfer)
        if asked.method not in methods:
            raise InvalidRequestError(
                f"method: {', '.join(methods)}, not {asked.method[:60]!r}", param="method", code="unsupported_parameter"
            )

        async def call(_: Request) -> Response:
            with control.part_of_update():
                await methods[asked.method](asked.kwargs or {})
            return JSONBody({"results": [None] * WORLD_SIZE})

        whose = turns.begins if asked.method == SKYRL_START else turns.holds
        return await whose(call)(request)

    return router


def calls(transfer: Transfer) -> dict[str, Callable[[dict[str, Any]], Awaitable[None]]]:
    """What SkyRL calls by name, with the keyword arguments that it sends."""

    async def update(arguments: dict[str, Any]) -> None:
        said = {"update_info": arguments.get("update_info")}
        body = parse(schema.UpdateWeightsBody, encode(said), UNKNOWN)
        await transfer.update(body.infos)

    async def start(arguments: dict[str, Any]) -> None:
        await transfer.start()

    async def finish(arguments: dict[str, Any]) -> None:
        await transfer.finish()

    return {
        SKYRL_START: start,
        "update_weights_nccl": update,
        "update_weights_ipc": update,
        "skyrl_finish_weight_update": finish,
    }
