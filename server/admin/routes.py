"""The admin API and the dashboard. Who may come in is decided in gate.py."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.convertors import IntegerConvertor, register_url_convertor

from slipstream.drafter.registry import exchange
from slipstream.drafter.registry.database import RegistryUnusableError
from slipstream.drafter.registry.states import RegistryError, TransitionError, UnknownVersionError
from slipstream.drafter.traffic.index import TrafficIndex, TrafficUnusableError
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.errors import ConfigError, ModelError, SlipstreamError
from slipstream.server.admin import answers
from slipstream.server.admin.commands import DrafterCommands
from slipstream.server.admin.schema import (
    EvolveBody,
    ExportBody,
    ImportBody,
    PruneBody,
    PurgeBody,
    ReasonBody,
)
from slipstream.server.admin.status import status
from slipstream.server.admin.target import TARGET_BODIES, target_router
from slipstream.server.asked import body_of, only
from slipstream.server.errors import (
    ApiError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
    VersionNotFoundError,
)
from slipstream.server.evolution.config import check_version_route
from slipstream.server.evolution.evolution import Evolution
from slipstream.server.http.body import Body
from slipstream.server.http.description import describe, parameter
from slipstream.server.http.json_response import JSONBody
from slipstream.server.http.page import DASHBOARD, page_response
from slipstream.server.service import Service

BODIES: tuple[type[Body], ...] = (
    *(ReasonBody, PruneBody, ImportBody, ExportBody, EvolveBody, PurgeBody),
    *TARGET_BODIES,
)
DESCRIBED = (*BODIES, *answers.ANSWERS)
BY_HAND = "by the admin API"
RETRY_WORKER_S = 5
RETRY_FILES_S = 60
"""Damaged files take somebody to mend them."""
LISTED = (parameter("route", type="string"), parameter("pruned", type="string", enum=["true", "false"]))
Result = TypeVar("Result")


class VersionConvertor(IntegerConvertor):
    """Python refuses to read numbers of thousands of digits."""

    regex = "[0-9]{1,100}"


def admin_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    prefix = "/admin/v1"
    commands = DrafterCommands()
    router.routes.extend(target_router(service).routes)
    register_url_convertor("version", VersionConvertor())
    one = prefix + "/drafters/{version:version}"

    @router.get("/dashboard", openapi_extra=describe("text/html"))
    async def dashboard() -> Response:
        """A page that shows what the server learns."""
        return page_response(DASHBOARD)

    @router.get(prefix + "/status", openapi_extra=describe(answers.Status))
    async def all_there_is() -> Response:
        """Everything the dashboard shows."""
        return JSONBody(await status(service))

    @router.get(prefix + "/drafters", openapi_extra=describe(answers.Drafters, 409, 503, query=LISTED))
    async def list_drafters(request: Request) -> Response:
        """The versions, oldest first."""
        registry = evolution_of(service).registry
        query = only(request, "route", "pruned")
        pruned = query.get("pruned", "false")
        if pruned not in ("true", "false"):
            raise InvalidRequestError(f"pruned: true or false, not {pruned!r}", param="pruned")
        found = await ask(registry.list, query.get("route"), pruned == "true")
        return JSONBody({"drafters": found})

    @router.get(one, openapi_extra=describe(answers.DrafterAndHistory, 404, 409, 503))
    async def show_drafter(version: int) -> Response:
        """One version, and what happened to it."""
        registry = evolution_of(service).registry
        found = await ask(registry.get, version)
        return JSONBody({"drafter": found, "history": await ask(registry.history, version)})

    @router.get(one + "/diff/{other:version}", openapi_extra=describe(answers.Difference, 404, 409, 503, 504))
    async def diff_drafters(version: int, other: int) -> Response:
        """How two versions differ."""
        registry = evolution_of(service).registry
        for each in (version, other):
            await ask(registry.get, each)
        return JSONBody(await commands.run(registry.folder, "diff", str(version), str(other)))

    @router.post(
        one + "/{action}",
        openapi_extra=describe(answers.DrafterAndLive, 404, 409, 503, bodies=[ReasonBody]),
    )
    async def change_drafter(request: Request, version: int, action: str) -> Response:
        """Promote, roll back, retire, pin or unpin a version."""
        evolution = evolution_of(service)
        registry = evolution.registry
        changes: dict[str, Callable[[int, str], Any]] = {
            "promote": registry.promote,
            "rollback": lambda number, why: registry.roll_back(registry.get(number).route, why, number),
            "retire": registry.retire,
            "pin": registry.pin,
            "unpin": registry.unpin,
        }
        if action not in changes:
            raise NotFoundError(f"there is no {action!r} for drafters; there are {', '.join(changes)}")
        reason = (await body_of(service, request, ReasonBody)).reason
        await ask(changes[action], version, reason or BY_HAND)
        evolution.poke()
        found = await ask(registry.get, version)
        return JSONBody({"drafter": found, "live": await ask(registry.live, found.route)})

    @router.post(prefix + "/drafters/prune", openapi_extra=describe(answers.Pruned, 409, 503, bodies=[PruneBody]))
    async def prune_drafters(request: Request) -> Response:
        """Delete the weights of old versions."""
        registry = evolution_of(service).registry
        body = await body_of(service, request, PruneBody)
        return JSONBody({"pruned": await ask(registry.prune, body.keep, body.route, body.reason or BY_HAND)})

    @router.post(
        prefix + "/drafters/import", openapi_extra=describe(answers.Imported, 409, 503, 504, bodies=[ImportBody])
    )
    async def import_drafter(request: Request) -> Response:
        """Add a head from a folder of this server as a candidate."""
        registry = evolution_of(service).registry
        body = await body_of(service, request, ImportBody)
        with asking("route"):
            check_version_route(body.route or "", "route")
        given = {name: value for name, value in body.model_dump().items() if value is not None and name != "folder"}
        await ask(registry.count)  # whether there is one that can be used
        served = service.engine_config
        options = {"target": served.model, "target_lineage": served.target_lineage, "quantize": served.quantize} | given
        with naming(body, "target", default="folder"):
            known = options["target"], options["target_lineage"], options["quantize"]
            await asyncio.to_thread(check_import, body.folder, *known)
            return JSONBody({"drafter": await commands.run(registry.folder, "import", body.folder, **options)})

    @router.post(
        prefix + "/drafters/export", openapi_extra=describe(answers.Exported, 404, 409, 503, 504, bodies=[ExportBody])
    )
    async def export_drafter(request: Request) -> Response:
        """Write a version into a folder of this server, in the EAGLE-3 layout."""
        registry = evolution_of(service).registry
        body = await body_of(service, request, ExportBody)
        await ask(registry.get, body.version)
        with naming(body, "folder", default=None):
            return JSONBody(await commands.run(registry.folder, "export", str(body.version), body.folder))

    @router.post(prefix + "/evolve", openapi_extra=describe(answers.Evolving, 409, 503, bodies=[EvolveBody]))
    async def evolve(request: Request) -> Response:
        """Pause training, go on with it, ask for a round now, or for what the round under way has made."""
        worker = evolution_of(service).worker
        if worker is None:
            raise ConflictError("nothing is trained here: start the server with --evolve idle", code="no_worker")
        action = (await body_of(service, request, EvolveBody)).action
        if action in ("train", "judge"):
            if worker.pid is None:
                raise UnavailableError(
                    "the training worker is being started", code="worker_down", retry_after_s=RETRY_WORKER_S
                )
            worker.send("train", reason="asked for") if action == "train" else worker.send("judge")
        else:
            worker.pause(action == "pause")
        return JSONBody({"paused": worker.paused, "report": worker.report})

    @router.get(prefix + "/traffic", openapi_extra=describe(answers.Traffic, 409, 503))
    async def traffic() -> Response:
        """What is kept of whom."""
        return JSONBody({"tenants": await ask(with_traffic, service, statistics)})

    @router.post(
        prefix + "/traffic/purge",
        openapi_extra=describe(answers.Purged, 409, 503, bodies=[PurgeBody], body_required=True),
    )
    async def purge_traffic(request: Request) -> Response:
        """Delete everything that is kept of a tenant, or of all."""
        body = await body_of(service, request, PurgeBody)
        if (body.tenant is None) != bool(body.all):
            raise InvalidRequestError("give either tenant, or all: true", param="tenant")
        count = await ask(with_traffic, service, lambda index: index.purge(body.tenant))
        return JSONBody({"purged_samples": count})

    return router


def evolution_of(service: Service) -> Evolution:
    """Raises ConflictError if this server has no registry."""
    if service.evolution is None:
        raise ConflictError("there is no drafter registry: start the server with --registry FOLDER", code="no_registry")
    return service.evolution


@contextmanager
def asking(field: str) -> Iterator[None]:
    """What an option may not be, this field may not be, either."""
    try:
        yield
    except ConfigError as error:
        raise InvalidRequestError(str(error).removeprefix("--"), param=field) from None


@contextmanager
def naming(body: Body, field: str, default: str | None) -> Iterator[None]:
    """What a command says of a path is an error of the field that holds it, or else of the default."""
    try:
        yield
    except InvalidRequestError as error:
        path = getattr(body, field)
        error.param = field if path and path in error.message else default
        raise


def check_import(folder: str, target: str, lineage: str, quantize: str) -> None:
    """Raises InvalidRequestError at once for what the command would refuse after it has begun and looked."""
    try:
        exchange.check_import(Path(folder), open_checkpoint(target), lineage=lineage, quantize=quantize)
    except (ModelError, OSError) as error:
        raise InvalidRequestError(f"import: {error}") from None


async def ask(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls what reads or writes files, in a thread; its errors become those of HTTP."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except UnknownVersionError as error:
        raise VersionNotFoundError(str(error)) from None
    except TransitionError as error:
        raise ConflictError(str(error), code="illegal_transition") from None
    except RegistryError as error:
        raise InvalidRequestError(str(error)) from None
    except RegistryUnusableError as error:
        raise UnavailableError(str(error), code="registry_unusable", retry_after_s=RETRY_FILES_S) from None
    except TrafficUnusableError as error:
        raise UnavailableError(str(error), code="traffic_unusable", retry_after_s=RETRY_FILES_S) from None
    except (SlipstreamError, OSError) as error:
        raise ApiError(str(error)) from None


def with_traffic(service: Service, do: Callable[[TrafficIndex], Result]) -> Result:
    folder = service.traffic.traffic_folder
    if folder is None:
        raise ConflictError(
            "no traffic is kept: start the server with --traffic-log and --traffic-folder", code="no_traffic"
        )
    index = TrafficIndex(folder)
    try:
        return do(index)
    finally:
        index.close()


def statistics(index: TrafficIndex) -> dict[str, Any]:
    return {tenant: dataclasses.asdict(entry) for tenant, entry in index.statistics().items()}
