"""POST /v1/responses, and what can be done with a response that is kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from slipstream.engine.messages import TrafficLevel
from slipstream.server.access.consent import LEVELS, keeping_at_most
from slipstream.server.access.deadline import DEADLINE, LIMIT_S, TOO_LONG, shortest
from slipstream.server.access.principal import owner_of
from slipstream.server.errors import ApiError, InvalidRequestError, NotFoundError, TimedOutError
from slipstream.server.generating import answer_without_engine, prepare_generation
from slipstream.server.generation import Generation
from slipstream.server.http.body import parse, read_body
from slipstream.server.http.json_response import JSONBody
from slipstream.server.openai.chat import begin_chat
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.respond.following import EventLog, FollowingResponse
from slipstream.server.respond.prepare import WITHOUT_ESCAPES, Kept, Responding, framed
from slipstream.server.respond.schema import CancelResponseBody, RespondBody
from slipstream.server.respond.store import ResponseStore, Stored
from slipstream.server.respond.writer import ResponseWriter
from slipstream.server.responses import GenerationResponse, LargeResponse
from slipstream.server.service import Service

logger = logging.getLogger(__name__)
encode = msgspec.json.Encoder().encode

CANCEL_S = 10.0
"""How long the end of a response that was cancelled is waited for."""
MOST_EVENT_BYTES = 2**22
"""Events of a response that has ended are kept up to here."""


class Responder:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = ResponseStore()
        self._tasks: set[asyncio.Task[None]] = set()
        """Responses in the background."""

    async def create(self, request: Request) -> Response:
        arrival = time.monotonic()
        service, owner = self._service, owner_of(request.scope)
        before: Stored | None = None
        speakers: list[Stored] = []

        async def with_history(raw: bytes) -> bytes:
            nonlocal before, speakers
            before, speakers, found = await self._with_history(owner, raw)
            return found

        prepared: Prepared[Responding] = await prepare_generation(service, request, "respond", with_history)
        asked = prepared.body.asked
        if asked.previous_response_id is not None and (before is None or before.id != asked.previous_response_id):
            raise InvalidRequestError(WITHOUT_ESCAPES, param="previous_response_id")
        # What was said earlier comes along, and with it what was said about keeping that.
        earlier = speakers if before is None else [before, *speakers]
        levels = [said.level for said in earlier if said.level is not None]
        generation, options = begin_chat(
            service, request, prepared, prepared.body.chat, "resp_", arrival, offsets=asked.wants_logprobs
        )
        for sequence in generation.sequences:
            sequence.request = keeping_at_most(sequence.request, levels)
        turns = (*(before.turns if before is not None else ()), prepared.body.items)
        stored = Stored(owner, generation.name, b"", turns=turns, level=self._level(generation, levels))
        stored.abort = lambda: service.engine.abort([each.request.request_id for each in generation.sequences])

        def on_end(response: dict[str, Any]) -> None:
            stored.is_open = False
            stored.ended.set()
            if asked.store is not False and stored.is_wanted:
                stored.body = encode(response)
                stored.items = {item["id"]: encode(without_logprobs(item)) for item in response["output"]}
                stored.turns += tuple(stored.items.values())
                if stored.events is None:
                    self._store.put(stored)

        tokenizer = service.text.tokenizer
        writer = ResponseWriter(generation, asked, options.model, prepared.speech, tokenizer, on_end, options.logprobs)
        stored.body = encode(writer.response)
        if asked.store is not False:
            self._store.put(stored)
        if asked.background:
            if asked.stream:
                stored.events = EventLog()
                stored.events.add(writer.begin())
            if (limit := request.scope.get(DEADLINE)) is not None:
                limit.reschedule(None)  # it is kept where the response is written
            limit_s = shortest(request.scope.get(LIMIT_S), generation.timeout_s)
            task = asyncio.create_task(self._write(generation, writer, stored, limit_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return JSONBody(writer.response) if stored.events is None else FollowingResponse(service, stored.events)
        return KeptResponse(self._store, stored, service, generation, writer, asked)

    async def count(self, request: Request) -> Response:
        owner = owner_of(request.scope)

        async def with_history(raw: bytes) -> bytes:
            return (await self._with_history(owner, raw))[2]

        return await answer_without_engine(self._service, request, "count_input_tokens", with_history)

    async def _with_history(self, owner: str, raw: bytes) -> tuple[Stored | None, list[Stored], bytes]:
        """The response before, those that have said what a body refers to, and the body with all of that."""
        kept = Kept()
        if b'"previous_response_id"' in raw or b'"item_reference"' in raw:
            kept = await self._service.work.run("referred_to", raw)
        before = None if kept.response is None else self._before(owner, kept.response)
        history = before.history if before is not None else b""
        return (
            before,
            self._store.speakers(owner, kept.items),
            framed(history, self._store.items(owner, kept.items), raw),
        )

    def retrieve(self, request: Request, name: str) -> Response:
        stored = self._store.get(owner_of(request.scope), name)
        after = request.query_params.get("starting_after", "-1")
        if request.query_params.get("stream", "false").lower() in ("false", "0"):
            return LargeResponse(self._service, stored.body)
        if not re.fullmatch("-1|[0-9]{1,9}", after):
            raise InvalidRequestError(
                f"starting_after: the sequence_number of an event, not {after[:60]!r}", param="starting_after"
            )
        if stored.events is None:
            raise InvalidRequestError(
                "stream: only what was asked for with background and stream can be followed, and after its end only "
                f"if its events have at most {MOST_EVENT_BYTES} bytes; ask without stream",
                param="stream",
            )
        return FollowingResponse(self._service, stored.events, int(after))

    async def delete(self, request: Request, name: str) -> Response:
        stored = self._store.get(owner_of(request.scope), name)
        stored.is_wanted = False
        self._store.drop(stored)
        if stored.is_open:
            stored.abort()
        return JSONBody({"id": name, "object": "response", "deleted": True})

    async def cancel(self, request: Request, name: str) -> Response:
        """One that has ended is answered as it is."""
        parse(CancelResponseBody, await read_body(request, self._service.config.max_body_bytes) or b"{}", "error")
        stored = self._store.get(owner_of(request.scope), name)
        if stored.is_open:
            stored.abort()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stored.ended.wait(), CANCEL_S)
        return LargeResponse(self._service, stored.body)

    def _level(self, generation: Generation, earlier: list[TrafficLevel]) -> TrafficLevel | None:
        """What those said who come back to this response may have kept of it at most; None if nothing was said."""
        request = generation.sequences[0].request
        if not request.remember:
            return "off"
        if not request.adapter and request.traffic != self._service.traffic.traffic_log:
            return request.traffic
        return min(earlier, key=LEVELS.index, default=None)

    def _before(self, owner: str, name: str) -> Stored:
        try:
            found = self._store.get(owner, name)
        except NotFoundError as error:
            raise InvalidRequestError(
                f"previous_response_id: {error.message}",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None
        if found.is_open:
            raise InvalidRequestError(
                f"previous_response_id: {name} is still being written", param="previous_response_id"
            )
        return found

    async def _write(
        self, generation: Generation, writer: ResponseWriter, stored: Stored, limit_s: float | None
    ) -> None:
        """A response in the background, at most so many seconds after it was asked for."""
        failure: ApiError | None = None
        events = stored.events
        ends = None if limit_s is None else generation.arrival + limit_s
        try:
            with self._service.responding(), generation:
                async with asyncio.timeout(None if ends is None else ends - time.monotonic()):
                    if events is None:
                        writer.body(await generation.collect())
                    else:
                        await _write_events(generation, writer, events)
        except ApiError as error:
            failure = error
        except TimeoutError:
            failure = TimedOutError(TOO_LONG)
        except Exception:
            logger.exception("response %s failed", generation.name)
            failure = ApiError("internal error; see the server's log")
        last = b"" if failure is None else writer.failed(failure)
        if events is not None:
            events.add(last)
            events.close()
            if events.size > MOST_EVENT_BYTES:
                stored.events = None
            if stored.is_wanted:
                self._store.put(stored)


async def _write_events(generation: Generation, writer: ResponseWriter, events: EventLog) -> None:
    while not generation.finished:
        events.add(b"".join([writer.chunk(*said) for said in await generation.next()]))
    events.add(writer.end())


def without_logprobs(item: dict[str, Any]) -> dict[str, Any]:
    """An item as the turns that follow need it."""
    if item["type"] != "message":
        return item
    return item | {"content": [part | {"logprobs": []} for part in item["content"]]}


class KeptResponse(GenerationResponse):
    """Forgets a response of which the client did not get the end."""

    def __init__(
        self,
        store: ResponseStore,
        stored: Stored,
        service: Service,
        generation: Generation,
        writer: ResponseWriter,
        asked: RespondBody,
    ) -> None:
        super().__init__(service, generation, writer, bool(asked.stream), writer.failed)
        self._store, self._stored = store, stored

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._stored.is_open:
                self._stored.is_open = False
                self._stored.ended.set()
                self._store.drop(self._stored)
