"""What the OpenAPI document says of a route: the bodies it takes, and every status it answers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from slipstream.server.body import JSON, Body

REFERENCE = "#/components/schemas/{model}"
ANYWHERE = (400, 401, 403, 408, 431, 500)
"""Status codes of HTTP itself, of the gate, and of what nobody foresaw: any route answers so."""
WITH_BODY = (413, 415)


class Answer(BaseModel):
    """A JSON answer. Handlers write answers as they please; tests hold them against these classes."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class Problem(Answer):
    message: str
    type: str
    param: str | None
    """Path of the field that is wrong."""
    code: str | None


class ErrorAnswer(Answer):
    error: Problem


def describe(
    answer: type[BaseModel] | str,
    *statuses: int,
    bodies: Sequence[type[Body]] = (),
    body_required: bool | None = None,
    media_type: str = JSON,
    raw_body: str | None = None,
    as_well: str | None = None,
    query: Sequence[dict[str, Any]] = (),
    stream: type[BaseModel] | None = None,
    stream_end: str = ", of the last [DONE]",
    errors: type[BaseModel] = ErrorAnswer,
    every_error: type[BaseModel] = ErrorAnswer,
) -> dict[str, Any]:
    """For ``openapi_extra`` of a route; its ``response_class`` must be Response, of which FastAPI says nothing itself.

    Args:
        answer: of status 200; the media type of what is not JSON.
        statuses: with an error, besides those that any route may answer.
        body_required: by default, if each of ``bodies`` has a field that has to be there; else no body is an empty one.
        media_type: of ``bodies``.
        raw_body: the media type of a body that is not JSON.
        as_well: another media type of the answer, for who asks for it.
        query: what ``parameter`` gives.
        stream: the events of an answer that is streamed; ``stream_end`` says what comes last.
        errors: the body of ``statuses``.
        every_error: the body of every error, where the route has a shape of its own.
    """
    content: dict[str, Any] = {answer: {"schema": {"type": "string"}}} if isinstance(answer, str) else json_of(answer)
    if as_well is not None:
        content[as_well] = {"schema": {"type": "string"}}
    if stream is not None:
        events = f'Server-sent events: the data of each is a {stream.__name__} or {{"error"}}{stream_end}.'
        content["text/event-stream"] = {"schema": {"type": "string", "description": events}}
    responses = {"200": {"description": "OK", "content": content}}
    errors = every_error if errors is ErrorAnswer else errors
    known: dict[int, type[BaseModel]] = {**dict.fromkeys(ANYWHERE, every_error), **dict.fromkeys(statuses, errors)}
    known |= dict.fromkeys(WITH_BODY if bodies or raw_body else (), every_error)
    for status, model in sorted(known.items()):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": json_of(model)}
    found: dict[str, Any] = {"responses": responses}
    if query:
        found["parameters"] = list(query)
    if bodies:
        if body_required is None:
            body_required = all(any(each.is_required() for each in body.model_fields.values()) for body in bodies)
        found["requestBody"] = {"required": body_required, "content": {media_type: json_of(*bodies)[JSON]}}
    elif raw_body is not None:
        found["requestBody"] = {
            "required": True,
            "content": {raw_body: {"schema": {"type": "string", "format": "binary"}}},
        }
    return found


def parameter(name: str, required: bool = False, **schema: Any) -> dict[str, Any]:
    """A parameter of the query, and the JSON schema of its values."""
    return {"name": name, "in": "query", "required": required, "schema": schema}


def json_of(*models: type[BaseModel]) -> dict[str, Any]:
    references = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    return {"application/json": {"schema": references[0] if len(references) == 1 else {"oneOf": references}}}


Door = Literal["open", "user", "admin"]
BEARER = {"type": "http", "scheme": "bearer"}
SCHEMES: dict[str, dict[str, Any]] = {
    "userKey": BEARER | {"description": "A key of --api-key, or of a user in the --keys-file."},
    "userKeyHeader": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same, in another header.",
    },
    "adminKey": BEARER | {"description": "A key of --admin-key, or of an admin in the --keys-file."},
}
DOORS: dict[Door, list[dict[str, list[str]]]] = {
    "open": [],
    "user": [{"userKey": []}, {"userKeyHeader": []}],
    "admin": [{"adminKey": []}],
}
NO_KEY: dict[str, list[str]] = {}


def finish(
    document: dict[str, Any],
    models: Sequence[type[BaseModel]],
    door_of: Callable[[str], Door],
    asks: Callable[[Door], bool],
) -> dict[str, Any]:
    """Adds what ``describe`` refers to and which keys open what, and takes out FastAPI's own error, which no route
    answers with.

    Args:
        door_of: a path.
        asks: whether a door is locked on this server.
    """
    all_models: list[type[BaseModel]] = [*models, ErrorAnswer]
    _, found = models_json_schema([(model, "validation") for model in all_models], ref_template=REFERENCE)
    known = document.setdefault("components", {}).setdefault("schemas", {})
    known.update(found["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    document["components"]["securitySchemes"] = SCHEMES
    for path, operations in document["paths"].items():
        door = door_of(path)
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["security"] = DOORS[door] if asks(door) else [*DOORS[door], NO_KEY]
    return document
