"""The routes of /v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from slipstream.server.asked import MAX_BODY_BYTES, body_of, only
from slipstream.server.batch import answers
from slipstream.server.batch.records import Batch, StoredFile, fresh
from slipstream.server.batch.runner import BatchRunner
from slipstream.server.batch.schema import BODIES, KEPT_S, CancelBatchBody, CreateBatchBody, KeptAfter, UploadBody
from slipstream.server.batch.store import BatchStore
from slipstream.server.batch.upload import MULTIPART, RETRY_DISK_S, read_upload
from slipstream.server.body import BYTES, parse, read_body
from slipstream.server.consent import DOMAIN_HEADER, LEVEL_HEADER, read_statement
from slipstream.server.description import describe, parameter
from slipstream.server.errors import ConflictError, InvalidRequestError, UnavailableError
from slipstream.server.headers import header_values
from slipstream.server.json_response import JSONBody
from slipstream.server.principal import owner_of, principal_of
from slipstream.server.service import Service

DESCRIBED = (*BODIES, *answers.ANSWERS)
MOST_FILES, MOST_BATCHES = 10_000, 100
MOST_NAME_CHARS = 255
PIECE_BYTES = 2**18
PAGE = [parameter("limit", type="integer"), parameter("after", type="string")]
FILES_PAGE = [
    *PAGE,
    parameter("purpose", type="string"),
    parameter("order", type="string", enum=["asc", "desc"]),
]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


async def ask(method: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
    """What a method of the store returns. Raises UnavailableError where the disk refuses."""
    try:
        return await asyncio.to_thread(method, *arguments, **named)
    except (OSError, sqlite3.Error) as error:
        raise UnavailableError(
            f"--batch-folder cannot be used: {error}", code="storage_unusable", retry_after_s=RETRY_DISK_S
        ) from error


def batch_router(service: Service, app: ASGIApp) -> APIRouter:
    """``app``, which has all routes, is asked for what batches consist of. Raises ConfigError for the folder."""
    router = APIRouter(default_response_class=Response)
    known, runner = None, None
    if (folder := service.config.batch_folder) is not None:
        known = BatchStore(Path(folder).expanduser(), service.config.max_stored_bytes)
        runner = BatchRunner(service, known, app)
        service.companions.add(runner)

    def store_of() -> BatchStore:
        """Raises ConflictError."""
        if known is None:
            raise ConflictError("this server has no batches; start it with --batch-folder FOLDER", code="no_batches")
        return known

    def wake() -> None:
        if runner is not None:
            runner.wake()

    @router.post(
        "/v1/files", openapi_extra=describe(answers.FileObject, 409, 503, bodies=[UploadBody], media_type=MULTIPART)
    )
    async def upload(request: Request) -> Response:
        """Keep a file of requests."""
        store = store_of()
        async with read_upload(request, service.config.max_file_bytes) as (found, body):
            now = int(time.time())
            stored = StoredFile(
                id=fresh("file-"),
                owner=owner_of(request.scope),
                bytes=found.size or 0,
                created_at=now,
                expires_at=now + seconds_kept(body.expires_after),
                filename=(found.filename or "upload.jsonl")[:MOST_NAME_CHARS],
                purpose=body.purpose,
            )
            await ask(store.add_file, stored, found.file)
        return JSONBody(stored.shown())

    @router.get("/v1/files", openapi_extra=describe(answers.FileList, 404, 409, 503, query=FILES_PAGE))
    async def list_files(request: Request) -> Response:
        """Your files, newest first."""
        store = store_of()
        query = only(request, "limit", "after", "purpose", "order")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequestError(f"order: asc or desc, not {order[:60]!r}", param="order")
        limit = page_size(query, MOST_FILES, MOST_FILES)
        found = await ask(
            store.files, owner_of(request.scope), query.get("purpose"), query.get("after"), limit, order == "desc"
        )
        return JSONBody(page(*found))

    @router.get("/v1/files/{name}/content", openapi_extra=describe(BYTES, 404, 409, 503))
    async def content(request: Request, name: str) -> Response:
        """What is in a file."""
        store = store_of()
        found = await ask(store.file, owner_of(request.scope), name)
        return FileBody(store.path(found.id), found.bytes)

    @router.get("/v1/files/{name}", openapi_extra=describe(answers.FileObject, 404, 409, 503))
    async def file(request: Request, name: str) -> Response:
        """What is known of a file."""
        found = await ask(store_of().file, owner_of(request.scope), name)
        return JSONBody(found.shown())

    @router.delete("/v1/files/{name}", openapi_extra=describe(answers.FileDeleted, 404, 409, 503))
    async def delete(request: Request, name: str) -> Response:
        """Delete a file."""
        await ask(store_of().delete_file, owner_of(request.scope), name)
        return JSONBody({"id": name, "object": "file", "deleted": True})

    @router.post("/v1/batches", openapi_extra=describe(answers.BatchObject, 409, 429, 503, bodies=[CreateBatchBody]))
    async def create(request: Request) -> Response:
        """Have the requests of a file answered when there is time."""
        store = store_of()
        body = parse(
            CreateBatchBody, await read_body(request, min(service.config.max_body_bytes, MAX_BODY_BYTES)), "error"
        )
        read_statement(request, None, None, service.traffic.traffic_consent)  # it has to mean something
        principal = principal_of(request.scope)
        now = int(time.time())
        batch = Batch(
            id=fresh("batch_"),
            owner=owner_of(request.scope),
            key=principal.key,
            headers=said_of_all(request),
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + body.seconds,
            output_id=fresh("file-"),
            error_id=fresh("file-"),
            output_seconds=seconds_kept(body.output_expires_after),
            metadata=body.metadata,
        )
        await ask(store.add_batch, batch)
        wake()
        return JSONBody(batch.shown())

    @router.get("/v1/batches", openapi_extra=describe(answers.BatchList, 404, 409, 503, query=PAGE))
    async def list_batches(request: Request) -> Response:
        """Your batches, newest first."""
        store = store_of()
        query = only(request, "limit", "after")
        limit = page_size(query, 20, MOST_BATCHES)
        return JSONBody(page(*await ask(store.batches, owner_of(request.scope), query.get("after"), limit)))

    @router.get("/v1/batches/{name}", openapi_extra=describe(answers.BatchObject, 404, 409, 503))
    async def one_batch(request: Request, name: str) -> Response:
        """How far a batch is."""
        return JSONBody((await ask(store_of().batch, owner_of(request.scope), name)).shown())

    @router.post(
        "/v1/batches/{name}/cancel",
        openapi_extra=describe(answers.BatchObject, 404, 409, 503, bodies=[CancelBatchBody]),
    )
    async def cancel(request: Request, name: str) -> Response:
        """End a batch; what is answered by then is kept."""
        store = store_of()
        await body_of(service, request, CancelBatchBody)

        def become_cancelling(batch: Batch) -> None:
            if batch.status in ("validating", "in_progress"):
                batch.become("cancelling", time.time())
            elif batch.status not in ("cancelling", "cancelled"):
                raise ConflictError(f"{name} is {batch.status}, and cannot be cancelled", code="batch_not_cancellable")

        batch = await ask(store.change, owner_of(request.scope), name, become_cancelling)
        wake()
        return JSONBody(batch.shown())

    return router


class FileBody(Response):
    """A file, piece by piece, as fast as the client reads it."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(media_type=BYTES, headers={"content-length": str(size)})
        self._path, self._size = path, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with await ask(self._path.open, "rb") as file:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            left = self._size
            while left > 0 and (piece := await asyncio.to_thread(file.read, min(left, PIECE_BYTES))):
                left -= len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def seconds_kept(asked: KeptAfter | None) -> int:
    return asked.seconds if asked is not None else KEPT_S


def said_of_all(request: Request) -> dict[str, str]:
    """Headers of the request that makes a batch which count for all requests in it."""
    found = {name: ", ".join(header_values(request.scope, name.lower())) for name in (LEVEL_HEADER, DOMAIN_HEADER)}
    return {name: value for name, value in found.items() if value}


def page(found: list[Any], has_more: bool) -> dict[str, Any]:
    ids = [each.id for each in found]
    shown = [each.shown() for each in found]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": has_more}


def page_size(query: dict[str, str], default: int, most: int) -> int:
    """Raises InvalidRequestError."""
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= most):
        raise InvalidRequestError(f"limit: 1 to {most}, not {text[:60]!r}", param="limit")
    return int(text)
