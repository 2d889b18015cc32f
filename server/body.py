"""From the bytes of a request body to a validated model, or to an error that names the field."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails, from_json, to_json

from slipstream.server.errors import BodyTooLargeError, InvalidRequestError, TooSlowError, UnsupportedMediaTypeError

logger = logging.getLogger(__name__)

BODY_TIMEOUT_S = 60.0


class Body(BaseModel):
    """A JSON request body: no coercion between types, no unknown fields, no NaN. A null field is an absent one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


BodyType = TypeVar("BodyType", bound=Body)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLargeError: it is, or says it is, larger than ``max_bytes``; the rest of it is not read.
        TooSlowError: it does not arrive in BODY_TIMEOUT_S.
        UnsupportedMediaTypeError: it is declared as something other than JSON. Browsers send other types across
            origins without asking first, so a web page could otherwise use a server on the reader's own machine.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(f"send the body as application/json, not as {media_type!r}")
    too_large = BodyTooLargeError(f"the body is larger than {max_bytes} bytes (--max-body-bytes)")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > max_bytes:
        raise too_large
    chunks = []
    received = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                received += len(chunk)
                if received > max_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise TooSlowError(f"the body took longer than {BODY_TIMEOUT_S:g} s") from None
    return b"".join(chunks)


def parse(model: type[BodyType], body: bytes, unknown_fields: Literal["error", "warn"]) -> BodyType:
    """Validates ``body``; unknown fields are ignored where they are null, or with a log line under "warn".

    Raises:
        InvalidRequestError: with the path of the first offending field as ``param``.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False)
    ignored = [
        detail
        for detail in details
        if detail["type"] == "extra_forbidden" and (detail["input"] is None or unknown_fields == "warn")
    ]
    if serious := [detail for detail in details if detail not in ignored]:
        raise invalid(serious, body)
    data = from_json(body)
    for detail in ignored:
        path = real_path(detail, data)
        if detail["input"] is not None:
            logger.warning("ignored unknown request field %s", dotted(path))
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        holder.pop(path[-1], None)
    return model.model_validate_json(to_json(data, inf_nan_mode="constants"))


def invalid(details: list[ErrorDetails], body: bytes) -> InvalidRequestError:
    if details[0]["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not valid JSON: {details[0]['ctx']['error']}", code="invalid_json")
    data = from_json(body)
    # Of the alternatives of a union, the one that got furthest into the data says most.
    detail = max(details, key=lambda detail: len(real_path(detail, data)))
    path = real_path(detail, data)
    name = dotted(path) or None
    if detail["type"] == "extra_forbidden":
        return InvalidRequestError(
            f"unknown field {name!r}; see --unknown-fields", param=name, code="unknown_parameter"
        )
    if detail["type"] == "missing":
        return InvalidRequestError(f"missing field {name!r}", param=name, code="missing_required_parameter")
    if detail["type"] == "unsupported":
        return InvalidRequestError(f"{name}: {detail['msg']}", param=name, code="unsupported_parameter")
    code = "invalid_type" if detail["type"].endswith("_type") else "invalid_value"
    return InvalidRequestError(f"{name or 'the body'}: {detail['msg']}{got(detail)}", param=name, code=code)


def real_path(detail: ErrorDetails, data: Any) -> list[str | int]:
    """The error's location without the parts that name types rather than places in the data."""
    path: list[str | int] = []
    for position, part in enumerate(detail["loc"]):
        missing = detail["type"] == "missing" and position == len(detail["loc"]) - 1
        if isinstance(data, dict) and (part in data or missing):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(part)
    return path


def dotted(path: list[str | int]) -> str:
    return ".".join(str(part) for part in path)


def got(detail: ErrorDetails) -> str:
    value = detail["input"]
    if isinstance(value, str | int | float | bool) and len(text := repr(value)) <= 60:
        return f", not {text}"
    return ""


def accepts(body: type[Body]) -> dict[str, Any]:
    """The request body for the OpenAPI page; the handlers read it themselves, with a limit on its size."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def schemas(bodies: Sequence[type[Body]]) -> dict[str, Any]:
    """What ``accepts`` refers to."""
    _, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    definitions: dict[str, Any] = found["$defs"]
    return definitions
