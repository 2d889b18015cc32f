"""The routes of /v1/messages/batches: batches as Anthropic's dialect has them, kept and run like all others."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from slipstream.server.access.consent import read_statement
from slipstream.server.access.principal import owner_of, principal_of
from slipstream.server.anthropic import answers
from slipstream.server.anthropic.errors import PATH, error_of
from slipstream.server.anthropic.prepare import MessageBatch
from slipstream.server.anthropic.schema import CancelMessageBatchBody, MessageBatchBody
from slipstream.server.asked import body_of, only
from slipstream.server.batch.desk import BatchDesk, ask, page_size, said_of_all
from slipstream.server.batch.lines import AnswerLine, decode_answer, pieces
from slipstream.server.batch.records import OPEN, Batch, RequestCounts, StoredFile, fresh
from slipstream.server.batch.schema import KEPT_S
from slipstream.server.errors import ConflictError, InvalidRequestError
from slipstream.server.generating import prepare
from slipstream.server.http.description import describe, parameter
from slipstream.server.http.json_response import JSONBody
from slipstream.server.service import Service

PREFIX = "msgbatch_"
WINDOW, WINDOW_S = "24h", 86400
MOST_LISTED = 1000
LINES = "application/x-jsonl"
CURSORS = ("after_id", "before_id")
BETA = "beta"
"""What the client says of routes of its beta, which are the same."""
PAGE = [parameter("limit", type="integer"), *(parameter(name, type="string") for name in (*CURSORS, BETA))]
NOT_ANSWERED = {"cancelled": b'{"type":"canceled"}', "expired": b'{"type":"expired"}'}

encode = msgspec.json.Encoder().encode


class ResultLine(msgspec.Struct):
    custom_id: str
    result: msgspec.Raw


def message_batches_router(service: Service, desk: BatchDesk) -> APIRouter:
    router = APIRouter(default_response_class=Response)
    problem = answers.MessageErrorAnswer

    @router.post(
        "/v1/messages/batches",
        openapi_extra=describe(
            answers.MessageBatchAnswer, 409, 429, 503, bodies=[MessageBatchBody], every_error=problem
        ),
    )
    async def create(request: Request) -> Response:
        """Have requests answered when there is time."""
        store = desk.store
        read_statement(request, None, None, service.traffic.traffic_consent)  # it has to mean something
        asked: MessageBatch = await prepare(service, request, "message_batch")
        owner, now = owner_of(request.scope), int(time.time())
        stored = StoredFile(
            id=fresh("file-"),
            owner=owner,
            bytes=len(asked.lines),
            created_at=now,
            expires_at=now + KEPT_S,
            filename="message_batch.jsonl",
            purpose="batch",
        )
        batch = Batch(
            id=fresh(PREFIX),
            owner=owner,
            key=principal_of(request.scope).key,
            headers=said_of_all(request),
            endpoint=PATH,
            input_file_id=stored.id,
            completion_window=WINDOW,
            created_at=now,
            expires_at=now + WINDOW_S,
            output_id=fresh("file-"),
            error_id=fresh("file-"),
            output_seconds=KEPT_S,
            model=asked.model,
            counts=RequestCounts(asked.count),
        )
        batch.become("in_progress", now)  # the lines are known to be readable
        await ask(store.add_file, stored, io.BytesIO(asked.lines))
        try:
            await ask(store.add_batch, batch)
        except Exception:
            await ask(store.delete_file, owner, stored.id)
            raise
        desk.wake()
        return JSONBody(shown(batch))

    @router.get(
        "/v1/messages/batches",
        openapi_extra=describe(answers.MessageBatchPage, 404, 409, 503, query=PAGE, every_error=problem),
    )
    async def list_batches(request: Request) -> Response:
        """Your batches, newest first."""
        store = desk.store
        query = only(request, "limit", *CURSORS, BETA)
        limit = page_size(query, 20, MOST_LISTED)
        after, before = (query.get(name) for name in CURSORS)
        if after is not None and before is not None:
            raise InvalidRequestError("before_id: not together with after_id", param="before_id")
        owner = owner_of(request.scope)
        found, has_more = await ask(store.batches, owner, PREFIX, after or before, limit, newest_first=before is None)
        data = [shown(batch) for batch in (found if before is None else reversed(found))]
        ids = [data[index]["id"] for index in (0, -1)] if data else [None, None]
        return JSONBody({"data": data, "has_more": has_more, "first_id": ids[0], "last_id": ids[1]})

    @router.get(
        "/v1/messages/batches/{name}/results", openapi_extra=describe(LINES, 404, 409, 503, every_error=problem)
    )
    async def results(request: Request, name: str) -> Response:
        """The answers of a batch that has ended, a line of JSON for each."""
        store, owner = desk.store, owner_of(request.scope)
        batch = await desk.batch(owner, name, PREFIX)
        if batch.status in OPEN:
            raise ConflictError(f"{name} has not ended", code="batch_not_ended")
        files = [
            (await ask(store.file, owner, file_id)).id
            for file_id, is_there in ((batch.output_id, batch.has_output), (batch.error_id, batch.has_errors))
            if is_there
        ]
        return StreamingResponse(results_of(batch, [store.path(each) for each in files]), media_type=LINES)

    @router.get(
        "/v1/messages/batches/{name}",
        openapi_extra=describe(answers.MessageBatchAnswer, 404, 409, 503, every_error=problem),
    )
    async def one(request: Request, name: str) -> Response:
        """How far a batch is."""
        return JSONBody(shown(await desk.batch(owner_of(request.scope), name, PREFIX)))

    @router.post(
        "/v1/messages/batches/{name}/cancel",
        openapi_extra=describe(
            answers.MessageBatchAnswer, 404, 409, 503, bodies=[CancelMessageBatchBody], every_error=problem
        ),
    )
    async def cancel(request: Request, name: str) -> Response:
        """End a batch; what is answered by then is kept."""
        _ = desk.store  # a server that has none says so first
        await body_of(service, request, CancelMessageBatchBody)
        return JSONBody(shown(await desk.cancel(owner_of(request.scope), name, PREFIX)))

    @router.delete(
        "/v1/messages/batches/{name}",
        openapi_extra=describe(answers.MessageBatchDeleted, 404, 409, 503, every_error=problem),
    )
    async def delete(request: Request, name: str) -> Response:
        """Delete a batch that has ended, and its answers."""
        store, owner = desk.store, owner_of(request.scope)
        await desk.batch(owner, name, PREFIX)
        await ask(store.delete_batch, owner, name)
        return JSONBody({"id": name, "type": "message_batch_deleted"})

    return router


def shown(batch: Batch) -> dict[str, Any]:
    """The counts are of what has ended only when all has."""
    has_ended = batch.status not in OPEN
    counts, left = batch.counts, batch.left
    is_cancelling = batch.status in ("cancelling", "finalizing") and batch.cancelling_at is not None
    ended_at = next(
        (at for at in (batch.completed_at, batch.cancelled_at, batch.expired_at, batch.failed_at) if at), None
    )
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": "ended" if has_ended else "canceling" if is_cancelling else "in_progress",
        "request_counts": {
            "processing": 0 if has_ended else counts.total,
            "succeeded": counts.completed if has_ended else 0,
            # Those of a batch whose input was lost have no answer either.
            "errored": counts.total - counts.completed - left if has_ended else 0,
            "canceled": left if batch.status == "cancelled" else 0,
            "expired": left if batch.status == "expired" else 0,
        },
        "created_at": moment(batch.created_at),
        "expires_at": moment(batch.expires_at),
        "ended_at": moment(ended_at),
        "cancel_initiated_at": moment(batch.cancelling_at),
        "archived_at": None,
        "results_url": f"/v1/messages/batches/{batch.id}/results" if has_ended else None,
    }


def moment(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


async def results_of(batch: Batch, files: list[Path]) -> AsyncIterator[bytes]:
    for path in files:
        remaining = pieces(path)
        while piece := await asyncio.to_thread(next, remaining, None):
            yield await asyncio.to_thread(lines_of, batch, piece)


def lines_of(batch: Batch, piece: list[tuple[int, bytes]]) -> bytes:
    found = [decode_answer(line) for _, line in piece]
    return b"".join(encode(ResultLine(each.custom_id, msgspec.Raw(result_of(batch, each)))) + b"\n" for each in found)


def result_of(batch: Batch, answer: AnswerLine) -> bytes:
    response = answer.response
    if response is None:
        return NOT_ANSWERED[batch.status]
    if response.status_code == 200:
        return b'{"type":"succeeded","message":' + bytes(response.body) + b"}"
    error = error_of(response.status_code, bytes(response.body), response.request_id)
    return b'{"type":"errored","error":' + error + b"}"
