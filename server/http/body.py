"""From the bytes of a request body to a validated model, or to an error that names the field."""

from __future__ import annotations

import asyncio
import logging
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json, to_json
from starlette.requests import Request

from slipstream.server.errors import BodyTooLargeError, InvalidRequestError, TooSlowError, UnsupportedMediaTypeError
from slipstream.server.http.headers import content_length, header
from slipstream.server.http.held import Hold

logger = logging.getLogger(__name__)

BODY_TIMEOUT_S = 60.0
MAX_DETAILS = 20
"""Errors and unknown fields that are looked at one by one."""
MAX_NAME_CHARS = 200
MAX_VALUE_CHARS = 60

MEDIA = ("audio", "document", "file", "image", "video")
"""What names of kinds of contents have in them that are no texts."""

ONLY_NULL: dict[str, Any] = {"type": "null"}
"""The JSON schema of fields that nobody knows, where they are refused: a null field is an absent one."""

Path = tuple[str | int, ...]
"""Where in a body something is."""


class Body(BaseModel):
    """A JSON request body: no coercion between types, no unknown fields, no NaN. A null field is an absent one.

    A whole number may be written 3.0, as JSON has one type of numbers and some languages one, too.

    ``parse`` is what refuses unknown fields; as errors of the validation they would each cost more than the field.
    """

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra={"additionalProperties": ONLY_NULL},
    )


class LooseBody(Body):
    """One whose unknown fields are ignored, with a line in the log."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})


BodyType = TypeVar("BodyType", bound=Body)


JSON, BYTES = "application/json", "application/octet-stream"


async def read_body(request: Request, max_bytes: int, held: Hold | None = None, media_type: str = JSON) -> bytes:
    """The whole body, whose bytes are added to ``held``.

    Raises:
        OverloadedError: there is no room for it.
        BodyTooLargeError: it is, or says it is, larger than ``max_bytes``; the rest of it is not read.
        TooSlowError: it does not arrive in BODY_TIMEOUT_S.
        UnsupportedMediaTypeError: it is compressed, or declared as something other than ``media_type``. Browsers send
            some types, none of which is taken here, across origins without asking first, so a web page could otherwise
            use a server on the reader's own machine.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    transfer = request.headers.get("transfer-encoding", "chunked").strip().lower()
    for name, found, plain in (("Content", coding, ("", "identity")), ("Transfer", transfer, ("chunked",))):
        if found not in plain:
            raise UnsupportedMediaTypeError(
                f"send the body as it is, not compressed: {name}-Encoding is {found[:60]!r}"
            )
    found = (
        request.headers.get("content-type", media_type if media_type == JSON else "").partition(";")[0].strip().lower()
    )
    # aiohttp, the client of most trainers, declares even the absence of a body as bytes. No browser does so unasked.
    is_nothing = found == BYTES and header(request.scope, "content-length") == "0"
    if found != media_type and not (media_type == JSON and (found.endswith("+json") or is_nothing)):
        raise UnsupportedMediaTypeError(f"send the body as {media_type}, not as {found!r}")
    too_large = BodyTooLargeError(f"the body is larger than {max_bytes} bytes; see --max-body-bytes")
    if content_length(request.scope) > max_bytes:
        raise too_large
    chunks = []
    received = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                received += len(chunk)
                if received > max_bytes:
                    raise too_large
                if held is not None:
                    held.add(len(chunk))
                chunks.append(chunk)
    except TimeoutError:
        raise TooSlowError(f"the body took longer than {BODY_TIMEOUT_S:g} s") from None
    body = b"".join(chunks)
    return body.removeprefix(BOM_UTF8) if media_type == JSON else body  # some editors and shells write one


def parse(model: type[BodyType], body: bytes, unknown_fields: Literal["error", "warn"]) -> BodyType:
    """Validates ``body``; unknown fields are ignored where they are null, or with a log line under "warn".

    The cost grows linearly with the body, whatever is in it: unknown fields come with the model instead of as errors.

    Raises:
        InvalidRequestError: with the path of the first offending field as ``param``.
    """
    try:
        found = validated(model, body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False)[:MAX_DETAILS], body) from None
    if unknown := [path for path, value in take_unknown(found) if value is not None]:
        if unknown_fields == "error":
            name = dotted(unknown[0])
            raise InvalidRequestError(
                f"unknown field {shown(name)}; see --unknown-fields", param=name, code="unknown_parameter"
            )
        names = ", ".join(shown(dotted(path), quotes=False) for path in unknown[:MAX_DETAILS])
        logger.warning("ignored unknown request field %s%s", names, ", …" if len(unknown) > MAX_DETAILS else "")
    return found


def validated(model: type[BodyType], body: bytes) -> BodyType:
    """Raises ValidationError. Only a body with whole numbers such as 3.0 in places of integers is looked at twice."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        whole = [
            detail["loc"]
            for detail in error.errors(include_url=False)
            if detail["type"] == "int_type" and isinstance(detail["input"], float) and detail["input"].is_integer()
        ]
        if not whole:
            raise
    data = from_json(body)
    for path in whole:
        write_whole(data, path)
    return model.model_validate_json(to_json(data, inf_nan_mode="constants"))


def write_whole(data: Any, path: Path) -> None:
    """Writes the number at an error's location as an integer; parts that name types are passed over."""
    for part in path:
        found = data.get(part) if isinstance(data, dict) else None
        if isinstance(data, list) and isinstance(part, int) and part < len(data):
            found = data[part]
        if isinstance(found, float):
            data[part] = int(found)
        elif isinstance(found, dict | list):
            data = found


def take_unknown(model: Body, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Path and value of the fields that a model and those in it do not know; they are taken out of it."""
    extra = model.model_extra or {}
    for name, value in extra.items():
        yield (*path, name), value
    extra.clear()
    model.model_fields_set.intersection_update(type(model).model_fields)
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Body):
            yield from take_unknown(value, (*path, name))
        elif isinstance(value, list) and value and isinstance(value[0], Body):  # lists are of one kind
            for index, item in enumerate(value):
                yield from take_unknown(item, (*path, name, index))


def invalid(details: list[ErrorDetails], body: bytes) -> InvalidRequestError:
    if details[0]["type"] == "json_invalid":
        hint = "" if is_utf8(body) else "; it must be UTF-8"
        if "hex escape" in str(details[0]["ctx"]["error"]):
            hint = "; half a pair of surrogates stands for no character"
        message = f"the body is not valid JSON: {details[0]['ctx']['error']}{hint}"
        return InvalidRequestError(message, code="invalid_json")
    data = from_json(body)
    # Of the alternatives of a union, the one that got furthest into the data says most.
    detail = max(details, key=lambda detail: len(real_path(detail, data)))
    name = dotted(real_path(detail, data))
    param = name or None
    if detail["type"] == "missing":
        return InvalidRequestError(f"missing field {shown(name)}", param=param, code="missing_required_parameter")
    where = shown(name, quotes=False) or "the body"
    if detail["type"] == "unsupported":
        return InvalidRequestError(f"{where}: {detail['msg']}", param=param, code="unsupported_parameter")
    code = "invalid_type" if detail["type"].endswith("_type") else "invalid_value"
    hint = "; the model takes texts only" if is_medium(detail) else ""
    return InvalidRequestError(f"{where}: {detail['msg']}{got(detail)}{hint}", param=param, code=code)


def is_medium(detail: ErrorDetails) -> bool:
    """Whether a content is of a kind such as ``image_url``."""
    found = str(detail["input"]) if detail["type"] == "literal_error" and detail["loc"][-1] == "type" else ""
    return any(medium in found[:MAX_VALUE_CHARS] for medium in MEDIA)


def is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in body[:4]  # in UTF-16 every other byte of JSON


def real_path(detail: ErrorDetails, data: Any) -> Path:
    """The error's location without the parts that name types rather than places in the data.

    Types that a body names by tags have blanks in them, so that no field of a client is called so.
    """
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
    return tuple(path)


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def shown(name: str, quotes: bool = True) -> str:
    """A name that a client made up, fit for a line of a log: short, without line breaks and control characters."""
    text = repr(name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "…")
    return text if quotes else text[1:-1]


def got(detail: ErrorDetails) -> str:
    value = detail["input"]
    if isinstance(value, str) and len(value) > MAX_VALUE_CHARS:
        return ""
    if isinstance(value, str | int | float | bool) and len(text := repr(value)) <= MAX_VALUE_CHARS:
        return f", not {text}"
    return ""
