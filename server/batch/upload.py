"""A file as clients send it: a multipart form, which Starlette reads."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from slipstream.server.batch.schema import UploadBody
from slipstream.server.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    TooSlowError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from slipstream.server.http.body import parse
from slipstream.server.http.headers import content_length

MULTIPART = "multipart/form-data"
UPLOAD_TIMEOUT_S = 600.0
MOST_FIELDS = 8
FIELD_BYTES = 4096
ROOM_BYTES = 2**16
"""For all that is not the file."""
RETRY_DISK_S = 5


@asynccontextmanager
async def read_upload(request: Request, most_bytes: int) -> AsyncIterator[tuple[UploadFile, UploadBody]]:
    """The file, which lies on the disk if it is large, and the other fields.

    Raises:
        UnsupportedMediaTypeError, BodyTooLargeError, TooSlowError.
        InvalidRequestError: it is no form, or a field is missing, unknown or wrong.
        UnavailableError: there is no room for it where it lies meanwhile.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MULTIPART:
        raise UnsupportedMediaTypeError(f"send the file as {MULTIPART}, not as {kind[:60]!r}")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaTypeError("send the file as it is, not compressed")
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
    if charset.lower() not in (b"utf-8", b"utf8"):
        raise UnsupportedMediaTypeError(f"send the form in UTF-8, not in {charset[:60].decode('latin-1')!r}")
    too_large = BodyTooLargeError(f"the file is larger than {most_bytes} bytes; see --max-file-bytes")
    if content_length(request.scope) > most_bytes + ROOM_BYTES:
        raise too_large

    async def bounded() -> AsyncIterator[bytes]:
        received = 0
        async for piece in request.stream():
            received += len(piece)
            if received > most_bytes + ROOM_BYTES:
                raise too_large
            yield piece

    parser = MultiPartParser(
        request.headers,
        bounded(),  # type: ignore[arg-type]  # an AsyncIterator is enough
        max_files=1,
        max_fields=MOST_FIELDS,
        max_part_size=FIELD_BYTES,
    )
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            form = await parser.parse()
    except TimeoutError:
        raise TooSlowError(f"the file took longer than {UPLOAD_TIMEOUT_S:g} s") from None
    except MultiPartException as error:
        raise InvalidRequestError(f"the body is no form: {error.message}", code="invalid_form") from None
    except (KeyError, UnicodeDecodeError, LookupError) as error:
        raise InvalidRequestError(f"the body is no form: {error!r}", code="invalid_form") from None
    except OSError as error:
        raise UnavailableError(
            f"a file that is sent lies in {tempfile.gettempdir()} at first, where there is no room: {error}; the "
            "server's variable TMPDIR names another folder",
            code="storage_unusable",
            retry_after_s=RETRY_DISK_S,
        ) from error
    try:
        found, fields = form.get("file"), fields_of(form)
        body = parse(UploadBody, msgspec.json.encode(fields), "error")
        if not isinstance(found, UploadFile):
            raise InvalidRequestError("missing field 'file'", param="file", code="missing_required_parameter")
        if (found.size or 0) > most_bytes:
            raise too_large
        yield found, body
    finally:
        await form.close()


def fields_of(form: FormData) -> dict[str, Any]:
    """Those that are no files; ``name[part]`` is a part of an object, as the OpenAI clients write one."""
    found: dict[str, Any] = {}
    for name, value in texts(form):
        outer, bracket, inner = name.partition("[")
        if bracket:
            part: Any = int(value) if value.isascii() and value.isdecimal() and len(value) < 16 else value
            within = found.setdefault(outer, {})
            if isinstance(within, dict):
                within[inner.removesuffix("]")] = part
        else:
            found[name] = value
    return found


def texts(form: FormData) -> Iterator[tuple[str, str]]:
    """Raises InvalidRequestError for a field that is there twice."""
    names = [name for name, _ in form.multi_items()]
    for name, value in form.multi_items():
        if names.count(name) > 1:
            raise InvalidRequestError(f"{name}: this field was sent twice", param=name)
        if isinstance(value, str):
            yield name, value
        elif name != "file":
            raise InvalidRequestError(f"{name}: the file is to be called 'file'", param=name)
