"""Answers a generating request: as server-sent events or as one JSON body; aborts it when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slipstream.server.access.deadline import DEADLINE, LIMIT_S, TOO_LONG, shortest
from slipstream.server.access.gate import send_error
from slipstream.server.errors import ApiError, TimedOutError, UnavailableError
from slipstream.server.generation import Generation, Piece, Sequence
from slipstream.server.service import Service

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Asks nginx not to hold events back.
    (b"x-accel-buffering", b"no"),
]
JSON = [(b"content-type", b"application/json")]
PIECE_BYTES = 64 * 2**10


class Writer(Protocol):
    """Turns pieces of sequences into the bytes of one dialect."""

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        """The events for one piece of a stream."""

    def end(self) -> bytes:
        """What goes out after the last piece of a stream."""

    def body(self, answers: list[Piece]) -> bytes:
        """The whole answer, one piece per sequence in their order."""


def error_event(error: ApiError) -> bytes:
    """The end of a stream that failed, as most dialects have it."""
    return b"data: " + error.body() + b"\n\n" + DONE


def require_whole(sequences: list[Sequence]) -> None:
    """Raises UnavailableError if one was aborted: for who can ask again, and has no use for a beginning."""
    if any(sequence.finish_reason == "abort" for sequence in sequences):
        raise UnavailableError("the request was aborted before it was computed", code="aborted", retry_after_s=1)


class GenerationResponse(Response):
    """Runs a generation from submission to its last byte."""

    def __init__(
        self,
        service: Service,
        generation: Generation,
        writer: Writer,
        stream: bool,
        error_event: Callable[[ApiError], bytes] = error_event,
    ) -> None:
        """``error_event`` writes the end of a stream that failed."""
        super().__init__()
        self._error_event = error_event
        self._service = service
        self._generation = generation
        self._writer = writer
        self._stream = stream
        self._started = False
        self._failure: ApiError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (limit := scope.get(DEADLINE)) is not None:
            limit.reschedule(None)  # from here on the deadline is kept here, where a stream can be told of it
        try:
            async with cancelled_on_disconnect(receive, self._deadline(scope)):
                with self._service.responding(), self._generation:
                    if self._stream:
                        await self._send_events(send)
                    else:
                        await self._send_body(send)
        except ApiError as error:
            self._failure = error
        except Exception:
            logger.exception("request %s failed", self._generation.name)
            self._failure = ApiError("internal error; see the server's log")
        finally:
            if self._service.tracing is not None:
                self._service.tracing.record(scope, self._generation, self._failure)
        if self._failure is not None:
            await self._send_error(send, self._failure)

    def _deadline(self, scope: Scope) -> float | None:
        limit = shortest(scope.get(LIMIT_S), self._generation.timeout_s)
        return None if limit is None else self._generation.arrival + limit

    async def _send_events(self, send: Send) -> None:
        writer = self._writer
        more = True
        while more:
            # The status line waits for the first piece, so that a request that fails before it gets a real status.
            batch = await self._generation.next()
            data = b"".join([writer.chunk(sequence, piece) for sequence, piece in batch])
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            if self._generation.finished:
                data += writer.end()
                more = False
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _send_body(self, send: Send) -> None:
        answers = await self._generation.collect()
        if self._generation.account.is_offline and self._generation.rollout is None:
            require_whole(self._generation.sequences)
        body = self._writer.body(answers)
        self._started = True
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*JSON, length]})
        await send_in_pieces(send, body)

    async def _send_error(self, send: Send, error: ApiError) -> None:
        if self._started:
            await send({"type": "http.response.body", "body": self._error_event(error)})
        else:
            await send_error(send, error)


class LargeResponse(Response):
    """A JSON answer that may be large: it counts as one under way, and its bytes as held, until the client has it."""

    def __init__(self, service: Service, body: bytes) -> None:
        super().__init__(body, media_type="application/json")
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.answers.hold() as held, self._service.responding():
            if len(self.body) > PIECE_BYTES:
                held.add(len(self.body))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send_in_pieces(send, bytes(self.body))


async def send_in_pieces(send: Send, body: bytes) -> None:
    """Each piece waits until the client has read most of those before."""
    for begin in range(0, len(body), PIECE_BYTES):
        piece = body[begin : begin + PIECE_BYTES]
        await send({"type": "http.response.body", "body": piece, "more_body": begin + PIECE_BYTES < len(body)})


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(receive: Receive, deadline: float | None) -> AsyncIterator[None]:
    """Ends its block when the client has gone away (silently) or at the deadline (with TimedOutError).

    ``deadline`` is a time.monotonic() value. The whole request body must have been received.
    """
    gone = False
    loop = asyncio.get_running_loop()

    async def listen() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        scope.reschedule(loop.time())

    listener = None
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()) as scope:
            listener = asyncio.create_task(listen())
            yield
    except TimeoutError:
        if not gone:
            raise TimedOutError(TOO_LONG) from None
    finally:
        if listener is not None:
            listener.cancel()
