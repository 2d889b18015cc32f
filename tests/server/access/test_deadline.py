"""The time limit of a request covers everything that happens to it."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from slipstream.server.access.deadline import DEADLINE, TIMEOUT_HEADER, Deadline


async def call(app: Any, limit_s: float, *headers: tuple[str, str]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    await Deadline(app, limit_s)({"type": "http", "path": "/v1/completions", "headers": raw}, receive, send)
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


async def waits(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


@pytest.mark.parametrize(("limit_s", "header"), [(0.0, "0.05"), (60.0, "5e-2"), (0.05, "60")])
async def test_the_shortest_limit_counts(limit_s: float, header: str) -> None:
    start, _ = await call(waits, limit_s, (TIMEOUT_HEADER, header))
    assert start["status"] == 504


@given(st.text(st.characters(codec="latin-1", exclude_characters="\0")) | st.floats().map(repr))
async def test_a_time_that_is_none_is_refused(text: str) -> None:
    try:
        sound = 0 < float(text.strip(" \t")) < math.inf
    except ValueError:
        sound = False
    assume(not sound)
    start, body = await call(waits, 0.0, (TIMEOUT_HEADER, text))
    assert start["status"] == 400
    assert json.loads(body["body"])["error"]["param"] == TIMEOUT_HEADER


@pytest.mark.parametrize(("field", "header"), [(0.3, None), (None, "0.3"), (0.3, "60"), (60, "0.3")])
def test_a_request_ends_when_its_sender_would_wait_no_longer(server: Any, field: Any, header: str | None) -> None:
    server.wait_until_idle()
    headers = {"content-type": "application/json"} | ({TIMEOUT_HEADER: header} if header else {})
    body = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "timeout_s": field}
    with server.suspended():
        status, _, reply = server.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
    assert (status, json.loads(reply)["error"]["code"]) == (504, "request_timeout")
    server.wait_until_idle()
    body |= {"stream": True}
    status, _, reply = server.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
    if status == 200:  # it has begun
        *_, failed, done, rest = reply.decode().split("\n\n")
        assert json.loads(failed.removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert (done, rest) == ("data: [DONE]", "")
    server.wait_until_idle()


def test_a_time_in_a_body_is_a_number_above_0(server: Any) -> None:
    for value in (0, -1, "5", True):
        status, reply = server.post("/v1/completions", {"prompt": "x", "timeout_s": value})
        assert (status, reply["error"]["param"]) == (400, "timeout_s")
    assert server.complete("x", max_tokens=1, timeout_s=300)["usage"]["completion_tokens"] == 1
