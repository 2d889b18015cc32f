"""Routes by which trainers send weights and ask about them; a face of server/rollout/."""

from __future__ import annotations

import hashlib
import math
from array import array
from contextlib import AsyncExitStack

from fastapi import APIRouter, Request, Response

from slipstream.engine.operations import PauseMode, TensorRows
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.description import describe
from slipstream.server.http.json_response import JSONBody
from slipstream.server.responses import LargeResponse
from slipstream.server.rollout import sources
from slipstream.server.service import Service
from slipstream.server.sglang import answers
from slipstream.server.sglang.asking import body_of, described, outcome, shared_handles, telling_failures
from slipstream.server.sglang.control_schema import (
    DEFAULT_GROUP,
    SGLangCheckBody,
    SGLangDiskBody,
    SGLangDistributedBody,
    SGLangGroupBody,
    SGLangLeaveBody,
    SGLangSessionBody,
    SGLangTensorBody,
    SGLangTensorNameBody,
)
from slipstream.server.sglang.updates import Updates

DEFAULT_ROWS = 100
TOGETHER = 2**62
"""Bytes of one broadcast in which all tensors come behind each other."""


def add_weight_routes(router: APIRouter, service: Service, updates: Updates) -> None:
    control = service.control
    turns = control.turns

    @router.post("/update_weights_from_disk", openapi_extra=described(SGLangDiskBody))
    @telling_failures
    async def from_disk(request: Request) -> Response:
        """Serve with the weights of a folder or file of the server's machine."""
        asked = await body_of(service, request, SGLangDiskBody)
        service.require_ready()
        mode: PauseMode = "abort" if asked.abort_all_requests else "wait"
        async with AsyncExitStack() as update:
            if not control.is_paused_for_good:  # whoever does not pause expects every answer to be of one version
                if asked.keep_pause:
                    await control.pause(mode, settle=True)
                else:
                    await update.enter_async_context(control.halted(mode))
            await control.update_from_disk(asked.model_path, asked.weight_version, await updates.prepare(asked))
        return outcome(f"Weight version {control.weight_version} serves.", num_paused_requests=0)

    @router.post("/update_weights_from_tensor", openapi_extra=described(SGLangTensorBody))
    @telling_failures
    @turns.holds
    async def from_tensors(request: Request) -> Response:
        """Take tensors that another process of this machine shares."""
        with control.part_of_update():
            asked = await body_of(service, request, SGLangTensorBody)
            pickled = shared_handles(asked.serialized_named_tensors[0], "serialized_named_tensors.0")
            mode = await updates.prepare(asked)
            await control.send_handles(pickled, version=asked.weight_version, mode=mode)
        return outcome(updates.took_bucket())

    @router.post("/init_weights_update_group", openapi_extra=described(SGLangGroupBody))
    @telling_failures
    @turns.takes
    async def join(request: Request) -> Response:
        """Join a trainer's group of processes; answered when all have joined."""
        asked = await body_of(service, request, SGLangGroupBody)
        await updates.begin()
        await control.join_group(
            asked.group_name or DEFAULT_GROUP,
            asked.master_address.strip("[]"),
            int(asked.master_port),
            asked.world_size,
            asked.rank_offset,
            asked.backend or "nccl",
        )
        return outcome("Joined the group.")

    @router.post("/destroy_weights_update_group", openapi_extra=described(SGLangLeaveBody))
    @telling_failures
    @turns.holds
    async def leave(request: Request) -> Response:
        """Leave a group."""
        asked = await body_of(service, request, SGLangLeaveBody)
        await control.leave_group(asked.group_name or DEFAULT_GROUP)
        return outcome("Left the group.")

    @router.post("/update_weights_from_distributed", openapi_extra=described(SGLangDistributedBody))
    @telling_failures
    @turns.holds
    async def from_group(request: Request) -> Response:
        """Take tensors that the trainer broadcasts."""
        with control.part_of_update():
            asked = await body_of(service, request, SGLangDistributedBody)
            mode = await updates.prepare(asked)
            tensors = list(zip(asked.names, asked.dtypes, asked.shapes, strict=True))
            packed = TOGETHER if asked.load_format == "flattened_bucket" else None
            group = asked.group_name or DEFAULT_GROUP
            await control.send(sources.from_group(group, tensors, packed), asked.weight_version, mode)
        return outcome(updates.took_bucket())

    @router.post("/begin_weight_update", openapi_extra=described(SGLangSessionBody))
    @telling_failures
    @turns.begins
    async def begin(request: Request) -> Response:
        """Weights are to come; those that have come of an update without an end are given up."""
        await body_of(service, request, SGLangSessionBody)
        service.require_ready()
        await updates.begin()
        return outcome("The weights may come.")

    @router.post("/end_weight_update", openapi_extra=described(SGLangSessionBody))
    @telling_failures
    @turns.holds
    async def end(request: Request) -> Response:
        """All weights have come that will; the others stay as they are."""
        await body_of(service, request, SGLangSessionBody)
        service.require_ready()
        await updates.end()
        return outcome(updates.took_bucket())

    @router.post(
        "/get_weights_by_name", openapi_extra=describe(answers.SGLangTensor, 503, bodies=[SGLangTensorNameBody])
    )
    async def tensor(request: Request) -> Response:
        """The first rows of a tensor that serves."""
        asked = await body_of(service, request, SGLangTensorNameBody)
        found = await control.read_tensor(asked.name, 0, asked.truncate_size or DEFAULT_ROWS)
        return LargeResponse(service, bytes(JSONBody(rows_of(found)).body))

    @router.post(
        "/weights_checker",
        openapi_extra=described(SGLangCheckBody, answer=answers.SGLangChecked),
    )
    @telling_failures
    async def check(request: Request) -> Response:
        """Compare the weights with a snapshot of them, or tell their checksums."""
        asked = await body_of(service, request, SGLangCheckBody)
        skipped = asked.skip_tensor_list or []

        def looked_at(name: str) -> bool:
            return not any(part in name for part in skipped)

        if asked.action == "snapshot":
            await control.snapshot_weights()
            return JSONBody({"success": True, "message": "Success."})
        if asked.action == "compare":
            differ = [name for name in await control.differing_weights() if looked_at(name)]
            if differ:
                message = f"{len(differ)} tensors are not as they were: {', '.join(differ[:5])}"
                raise InvalidRequestError(message, code="weights_differ")
            return JSONBody({"success": True, "message": "Success."})
        found = {name: value for name, value in (await control.checksums()).items() if looked_at(name)}
        whole = hashlib.sha256("".join(f"{name}={found[name]}\n" for name in sorted(found)).encode()).hexdigest()
        rank = {"checksums": found, "per_gpu_checksum": whole, "parallelism_info": [RANK]}
        body = {"success": True, "message": "Success.", "ranks": [rank], "per_engine_checksum": whole}
        return LargeResponse(service, bytes(JSONBody(body).body))


RANK = {"role": "target"} | {
    f"{prefix}{name}": value for prefix in ("tp_", "dp_", "pp_", "") for name, value in (("rank", 0), ("size", 1))
}


def rows_of(found: TensorRows) -> list[float] | list[list[float]]:
    """The values of a vector, or the rows of a matrix."""
    values = array("f", found.values).tolist()
    if len(found.shape) < 2:
        return values
    width = math.prod(found.shape[1:])
    return [values[i : i + width] for i in range(0, len(values), width)]
