"""The ASGI application: routes, and one shape for every error."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp

from slipstream.server.access.deadline import Deadline
from slipstream.server.access.gate import OPEN_PATHS, AdminPaths, guarded
from slipstream.server.admin import profile
from slipstream.server.admin import routes as admin
from slipstream.server.anthropic import batches as anthropic_batches
from slipstream.server.anthropic import routes as anthropic
from slipstream.server.anthropic.errors import TranslatedErrors
from slipstream.server.batch import routes as batch
from slipstream.server.batch.desk import BatchDesk
from slipstream.server.errors import ApiError, MethodNotAllowedError, NotFoundError
from slipstream.server.http.description import Answer, Door, describe, finish
from slipstream.server.http.edge import Edge
from slipstream.server.http.json_response import JSONBody
from slipstream.server.http.page import CHAT, page_response
from slipstream.server.openai import routes as openai
from slipstream.server.respond import routes as respond
from slipstream.server.service import Service
from slipstream.server.sglang import routes as sglang
from slipstream.server.telemetry.metrics import OPENMETRICS
from slipstream.server.version import commit
from slipstream.server.vllm import control as vllm_control
from slipstream.server.vllm import routes as vllm

logger = logging.getLogger(__name__)
API = "/v1/"
OTHERS = {
    **dict.fromkeys([f"/api/{name}" for name in ("chat", "embed", "generate", "ps", "show", "tags")], "Ollama's"),
    **dict.fromkeys(["/apply-template", "/completion", "/infill", "/props", "/slots"], "llama.cpp's"),
    "/generate_stream": "TGI's",
}
"""Routes of other servers that clients take this one for."""
METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
"""Those that routes may have; HEAD and OPTIONS are answered for all of them."""


class Health(Answer):
    status: str
    """ok, or what is amiss."""
    reason: str | None = None


class Version(Answer):
    version: str
    commit: str | None = None
    """What it was built of, if that is known."""


DIALECTS = (openai, respond, batch, anthropic, sglang, vllm, vllm_control, admin, profile)
DESCRIBED = tuple(dict.fromkeys([*(model for dialect in DIALECTS for model in dialect.DESCRIBED), Health, Version]))
"""Bodies and answers, for the OpenAPI document."""


def build_app(service: Service) -> ASGIApp:
    app = FastAPI(title="Slipstream", version=version("slipstream"), redoc_url=None, redirect_slashes=False)
    generating = [
        *(openai.openai_router(service), respond.respond_router(service), anthropic.anthropic_router(service)),
        *(sglang.sglang_router(service), vllm.vllm_router(service)),
    ]
    controls = [sglang.control_router(service), sglang.refused_router(service), profile.profile_router(service)]
    controls += vllm_control.control_routers(service)
    desk = BatchDesk(service, app)
    batches = [batch.batch_router(service, desk), anthropic_batches.message_batches_router(service, desk)]
    for router in (*generating, *batches, *controls, admin.admin_router(service)):
        app.router.routes.extend(router.routes)  # included ones are built twice, and matched through a second layer
    for path in paths(generating):
        service.metrics.expect_failures(path)
    offered = [path for path in paths([*generating, *batches]) if path.startswith(API) and "{" not in path]

    @app.get("/health", response_class=Response, openapi_extra=describe(Health, 503, errors=Health))
    @app.get("/ping", response_class=Response, openapi_extra=describe(Health, 503, errors=Health))
    async def health() -> Response:
        """200 while the engine makes progress."""
        status, body = service.health()
        return JSONBody(body, status)

    @app.get("/ready", response_class=Response, openapi_extra=describe(Health, 503, errors=Health))
    async def ready() -> Response:
        """200 while requests are taken."""
        status, body = service.ready()
        return JSONBody(body, status)

    @app.get("/metrics", response_class=Response, openapi_extra=describe("text/plain", as_well=OPENMETRICS))
    async def metrics(request: Request) -> Response:
        """Prometheus metrics, as OpenMetrics for who asks for that."""
        body, content_type = service.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type, "vary": "accept"})

    @app.get("/", response_class=Response, openapi_extra=describe("text/html"))
    async def chat_page() -> Response:
        """A conversation with the model, for who opens the server's address in a browser."""
        return page_response(CHAT)

    @app.get("/version", response_class=Response, openapi_extra=describe(Version))
    async def server_version() -> Response:
        return JSONBody({"version": version("slipstream"), "commit": commit()})

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            meant = route_meant(request.url.path, offered)
            hint = f"; there is {meant}: the base URL may have a part too many or too few" if meant else ""
            if (whose := OTHERS.get(request.url.path.rstrip("/"))) is not None:
                hint = f", which is of {whose} own API; OpenAI's is at {API}"
            return error_response(NotFoundError(f"there is no route {where}{hint}"))
        if error.status_code == 405:
            return refuse_method(request, where)
        return error_response(ApiError(str(error.detail)), status=error.status_code)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return error_response(ApiError("internal error; see the server's log"))

    describe_routes = app.openapi

    administrative = AdminPaths(paths(controls))

    def door_of(path: str) -> Door:
        return "open" if path in OPEN_PATHS else "admin" if path in administrative else "user"

    def asks(door: Door) -> bool:
        return door != "open" and (service.keys.has_admins if door == "admin" else service.keys.asks)

    def openapi() -> dict[str, Any]:
        return finish(describe_routes(), DESCRIBED, door_of, asks)

    app.openapi = openapi  # type: ignore[method-assign]
    guard = guarded(app, service.config, service.keys, service.metrics, administrative)
    return Edge(TranslatedErrors(Deadline(guard, service.config.request_timeout_s, administrative)))


def paths(routers: Iterable[APIRouter]) -> list[str]:
    """Raises TypeError for a router within one of them, whose paths would be missing: the gate has to know all."""
    found = []
    for router in routers:
        for route in router.routes:
            if not isinstance(route, APIRoute):
                raise TypeError(f"{route!r} is no route: register the router that it comes from by itself")
            found.append(route.path)
    return found


def route_meant(path: str, offered: Iterable[str]) -> str | None:
    """Which of the paths ``offered`` (beneath API) a client means whose base URL is wrong: its path ends alike."""

    def parts_of(path: str) -> list[str]:
        return [part for part in path.lower().split("/") if part not in ("", API.strip("/"))]

    asked = parts_of(path)
    fitting = [each for each in offered if asked[-len(parts_of(each)) :] == parts_of(each)]
    return max(fitting, key=len, default=None)


def refuse_method(request: Request, where: str) -> Response:
    """Says the methods of all routes with this path. To OPTIONS they are the answer."""

    routes = request.app.routes
    path = next(each.path for each in routes if each.matches(request.scope)[0] is not Match.NONE)

    def is_possible(method: str) -> bool:
        asked = {**request.scope, "method": method}
        return any(each.matches(asked)[0] is Match.FULL for each in routes if each.path == path)

    methods = [method for method in METHODS if is_possible(method)]
    allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": allowed})
    response = error_response(MethodNotAllowedError(f"{where} is not possible; allowed: {allowed}"))
    response.headers["allow"] = allowed
    return response


def error_response(error: ApiError, status: int | None = None) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), status or error.status, headers)
