"""The time limit of a request covers everything that happens to it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from slipstream.server.deadline import DEADLINE, Deadline


async def call(app: Any, limit_s: float) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    await Deadline(app, limit_s)({"type": "http", "path": "/v1/completions"}, receive, send)
    return sent


async def test_a_request_that_takes_too_long_gets_504() -> None:
    async def waits_for_its_body(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    start, body = await call(waits_for_its_body, 0.05)
    assert start["status"] == 504
    assert json.loads(body["body"])["error"]["code"] == "request_timeout"


async def test_half_an_answer_is_not_made_a_whole_one() -> None:
    async def stops(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()

    with pytest.raises(TimeoutError):
        await call(stops, 0.05)


async def test_a_stream_takes_the_deadline_over() -> None:
    async def streams(scope: Scope, receive: Receive, send: Send) -> None:
        scope[DEADLINE].reschedule(None)
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    assert [message["status"] for message in await call(streams, 0.05)] == [200]
