"""What the OpenAPI document says of a route: the bodies it takes, and every status it answers with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from slipstream.server.http.body import JSON, ONLY_NULL, Body, LooseBody

REFERENCE = "#/components/schemas/{model}"
PARTS = re.compile(r'"#/components/schemas/(\w+)"')
LOOSE = "Loosely"
"""Ends the names of schemas of what is like another, but ignores unknown fields."""
ANYWHERE = (400, 401, 403, 408, 431, 500)
"""Status codes of HTTP itself, of the gate, and of what nobody foresaw: any route answers so."""
WITH_BODY = (413, 415)
BUSY = (404, 429, 503, 504)
"""What generating routes answer too: another model, the queue is full, requests are not taken now, it took too long."""


class Answer(BaseModel):
    """A JSON answer. Handlers write answers as they please; tests hold them against these classes."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=(), defer_build=True)


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
    stream_end: str = "[DONE]",
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
        stream: the events of an answer that is streamed; ``stream_end`` is what the data of the last one says, if any.
        errors: the body of ``statuses``.
        every_error: the body of every error, where the route has a shape of its own.
    """
    content: dict[str, Any] = {answer: {"schema": {"type": "string"}}} if isinstance(answer, str) else json_of(answer)
    if as_well is not None:
        content[as_well] = {"schema": {"type": "string"}}
    if stream is not None:
        content["text/event-stream"] = {"schema": _event_of(stream, every_error, stream_end)}
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


def _event_of(model: type[BaseModel], error: type[BaseModel], end: str) -> dict[str, Any]:
    """The schema of each event of a stream, which is what OpenAPI 3.1 takes the schema of a stream for."""
    parts = [{"$ref": REFERENCE.format(model=each.__name__)} for each in (model, error)]
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": parts}}
    last = f'; the data of the last one is "{end}"' if end else ""
    return {
        "type": "object",
        "description": f"A server-sent event: its data is a {model.__name__}, or an {error.__name__}{last}.",
        "properties": {"event": {"type": "string"}, "data": {"anyOf": [data, {"const": end}]} if end else data},
        "required": ["data"],
    }


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
    known = document.setdefault("components", {}).setdefault("schemas", {})
    known.update(_schemas(tuple(models)))
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    document["components"]["securitySchemes"] = SCHEMES
    for path, operations in document["paths"].items():
        door = door_of(path)
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["security"] = DOORS[door] if asks(door) else [*DOORS[door], NO_KEY]
    return document


@cache  # they take a quarter of a second, for which nothing else would be answered
def _schemas(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """By name: those of bodies and answers, of their parts, and of errors. Shared: not to be changed."""
    all_models: list[type[BaseModel]] = [*models, ErrorAnswer]
    _, found = models_json_schema([(model, "validation") for model in all_models], ref_template=REFERENCE)
    schemas: dict[str, Any] = found["$defs"]
    _loosen(schemas, [model.__name__ for model in models if model.model_config == LooseBody.model_config])
    return schemas


def _loosen(schemas: dict[str, Any], names: list[str]) -> None:
    """Where a body ignores unknown fields its parts do, too: they get schemas of their own, since other bodies, which
    refuse such fields, may have the same parts."""
    seen = set(names)
    while names:
        name = names.pop()
        text = json.dumps(schemas[name])
        for part in set(PARTS.findall(text)):
            if schemas[part].get("additionalProperties") == ONLY_NULL:
                text = text.replace(f'"{REFERENCE.format(model=part)}"', f'"{REFERENCE.format(model=part + LOOSE)}"')
                schemas.setdefault(part + LOOSE, schemas[part] | {"additionalProperties": True})
                part += LOOSE
            if part not in seen:
                seen.add(part)
                names.append(part)
        schemas[name] = json.loads(text)
