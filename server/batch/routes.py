"""The routes of /v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from slipstream.server.access.consent import read_statement
from slipstream.server.access.principal import owner_of, principal_of
from slipstream.server.asked import MAX_BODY_BYTES, body_of, only
from slipstream.server.batch import answers
from slipstream.server.batch.desk import BatchDesk, ask, page_size, said_of_all
from slipstream.server.batch.records import Batch, StoredFile, fresh
from slipstream.server.batch.schema import BODIES, KEPT_S, CancelBatchBody, CreateBatchBody, KeptAfter, UploadBody
from slipstream.server.batch.upload import MULTIPART, read_upload
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import BYTES, parse, read_body
from slipstream.server.http.description import describe, parameter
from slipstream.server.http.json_response import JSONBody
from slipstream.server.service import Service

DESCRIBED = (*BODIES, *answers.ANSWERS)
MOST_FILES, MOST_BATCHES = 10_000, 100
MOST_NAME_CHARS = 255
PREFIX = "batch_"
PIECE_BYTES = 2**18
PAGE = [parameter("limit", type="integer"), parameter("after", type="string")]
FILES_PAGE = [
    *PAGE,
    parameter("purpose", type="string"),
    parameter("order", type="string", enum=["asc", "desc"]),
]


def batch_router(service: Service, desk: BatchDesk) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    @router.post(
        "/v1/files", openapi_extra=describe(answers.FileObject, 409, 503, bodies=[UploadBody], media_type=MULTIPART)
    )
    async def upload(request: Request) -> Response:
        """Keep a file of requests."""
        store = desk.store
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
        store = desk.store
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
        store = desk.store
        found = await ask(store.file, owner_of(request.scope), name)
        return FileBody(store.path(found.id), found.bytes)

    @router.get("/v1/files/{name}", openapi_extra=describe(answers.FileObject, 404, 409, 503))
    async def file(request: Request, name: str) -> Response:
        """What is known of a file."""
        found = await ask(desk.store.file, owner_of(request.scope), name)
        return JSONBody(found.shown())

    @router.delete("/v1/files/{name}", openapi_extra=describe(answers.FileDeleted, 404, 409, 503))
    async def delete(request: Request, name: str) -> Response:
        """Delete a file."""
        await ask(desk.store.delete_file, owner_of(request.scope), name)
        return JSONBody({"id": name, "object": "file", "deleted": True})

    @router.post("/v1/batches", openapi_extra=describe(answers.BatchObject, 409, 429, 503, bodies=[CreateBatchBody]))
    async def create(request: Request) -> Response:
        """Have the requests of a file answered when there is time."""
        store = desk.store
        body = parse(
            CreateBatchBody, await read_body(request, min(service.config.max_body_bytes, MAX_BODY_BYTES)), "error"
        )
        read_statement(request, None, None, service.traffic.traffic_consent)  # it has to mean something
        principal = principal_of(request.scope)
        now = int(time.time())
        batch = Batch(
            id=fresh(PREFIX),
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
        desk.wake()
        return JSONBody(batch.shown())

    @router.get("/v1/batches", openapi_extra=describe(answers.BatchList, 404, 409, 503, query=PAGE))
    async def list_batches(request: Request) -> Response:
        """Your batches, newest first."""
        store = desk.store
        query = only(request, "limit", "after")
        limit = page_size(query, 20, MOST_BATCHES)
        owner = owner_of(request.scope)
        return JSONBody(page(*await ask(store.batches, owner, PREFIX, query.get("after"), limit)))

    @router.get("/v1/batches/{name}", openapi_extra=describe(answers.BatchObject, 404, 409, 503))
    async def one_batch(request: Request, name: str) -> Response:
        """How far a batch is."""
        return JSONBody((await desk.batch(owner_of(request.scope), name, PREFIX)).shown())

    @router.post(
        "/v1/batches/{name}/cancel",
        openapi_extra=describe(answers.BatchObject, 404, 409, 503, bodies=[CancelBatchBody]),
    )
    async def cancel(request: Request, name: str) -> Response:
        """End a batch; what is answered by then is kept."""
        _ = desk.store  # a server that has none says so first
        await body_of(service, request, CancelBatchBody)
        return JSONBody((await desk.cancel(owner_of(request.scope), name, PREFIX)).shown())

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


def page(found: list[Any], has_more: bool) -> dict[str, Any]:
    ids = [each.id for each in found]
    shown = [each.shown() for each in found]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": has_more}
