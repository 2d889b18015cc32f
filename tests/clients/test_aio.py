import asyncio
import socket
import threading
from time import perf_counter

import msgspec
import pytest

from slipstream.clients.aio import AsyncClient
from slipstream.clients.errors import APIError, BrokenStreamError, ClientError, UnreachableError, api_error

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def token(text: str) -> bytes:
    return b'data: {"choices": [{"delta": {"content": "%b"}}]}\n\n' % text.encode()


def content(chunk) -> str:
    return chunk.data["choices"][0]["delta"]["content"]


async def collect(client: AsyncClient) -> list:
    async with client.chat_stream(BODY) as stream:
        return [chunk async for chunk in stream]


async def test_stream_yields_chunks_with_the_time_of_their_arrival(wire, reply):
    wire.replies = [reply.stream(token("a"), token("b"), reply.PAUSE, token("c") + token("d"), b"data: [DONE]\n\n")]
    async with AsyncClient(wire.url) as client:
        sent, chunks = perf_counter(), []
        async with client.chat_stream(BODY) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                if content(chunk) == "b":
                    paused = perf_counter()
                    wire.resume.set()
    assert [content(chunk) for chunk in chunks] == ["a", "b", "c", "d"]
    a, b, c, d = (chunk.received for chunk in chunks)
    assert sent < a < b < paused < c == d
    line, headers, body = wire.requests[0]
    assert line == "POST /v1/chat/completions HTTP/1.1"
    assert headers["content-type"] == "application/json"
    assert msgspec.json.decode(body) == {**BODY, "stream": True}


async def test_an_event_cut_between_reads_comes_with_its_last_byte(wire, reply):
    event = token("long")
    wire.replies = [reply.stream(event[:9], event[9:-1], event[-1:], b"data: [DO", b"NE]\n\n")]
    async with AsyncClient(wire.url) as client:
        assert [content(chunk) for chunk in await collect(client)] == ["long"]


async def test_connection_serves_the_next_request_after_done(wire, reply):
    wire.replies = [reply.stream(token("a"), b"data: [DONE]\n\n") for _ in range(3)]
    async with AsyncClient(wire.url) as client:
        for _ in range(3):
            await collect(client)
    assert wire.connections == 1


async def test_leaving_the_stream_early_disconnects(wire, reply):
    wire.replies = [reply.stream(token("a"), reply.PAUSE, token("b"))]
    async with AsyncClient(wire.url) as client:
        async with client.chat_stream(BODY) as stream:
            assert content(await anext(stream)) == "a"
        await asyncio.wait_for(wire.lost.wait(), 300)


async def test_cancelling_before_the_first_byte_disconnects(wire, reply):
    wire.replies = [[reply.PAUSE]]
    async with AsyncClient(wire.url) as client:
        waiting = asyncio.create_task(collect(client))
        while not wire.requests:
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(wire.lost.wait(), 300)


@pytest.mark.parametrize(
    ("pieces", "end", "message"),
    [
        ([token("a")], True, "without"),
        ([token("a")], False, "connection lost"),
        ([token("a"), b"data: [DONE]\n\n" + token("b")], True, "follows"),
        ([b"data: {oops\n\n"], True, "not JSON"),
    ],
)
async def test_incomplete_streams_are_errors(wire, reply, pieces, end, message):
    wire.replies = [reply.stream(*pieces, end=end)]
    async with AsyncClient(wire.url) as client:
        with pytest.raises(BrokenStreamError, match=message):
            await collect(client)


async def test_an_answer_that_is_no_stream_is_an_error(wire, reply):
    wire.replies = [reply.response(b'{"choices": []}')]
    async with AsyncClient(wire.url) as client:
        with pytest.raises(BrokenStreamError, match="application/json"):
            await collect(client)


async def test_an_error_inside_a_stream_is_told_with_its_fields(wire, reply):
    event = b'data: {"error": {"message": "engine died", "type": "server_error", "code": 500}}\n\n'
    wire.replies = [reply.stream(token("a"), event)]
    async with AsyncClient(wire.url) as client:
        with pytest.raises(APIError) as caught:
            await collect(client)
    assert (caught.value.status, caught.value.message, caught.value.kind) == (200, "engine died", "server_error")


async def test_error_answers_carry_status_fields_and_retry_after(wire, reply):
    body = b'{"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "bad"}}'
    wire.replies = [reply.response(body, "503 Service Unavailable", Retry_After="7")]
    async with AsyncClient(wire.url) as client:
        with pytest.raises(APIError) as caught:
            await client.chat(BODY)
    error = caught.value
    assert (error.status, error.kind, error.param, error.code, error.retry_after) == (
        503,
        "invalid_request_error",
        "n",
        "bad",
        7.0,
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"object": "error", "message": "flat", "type": "T", "code": 400}', "flat"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["body"], "msg": "missing"}]}', '[{"loc":["body"],"msg":"missing"}]'),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b"<h1>Bad Gateway</h1>", "<h1>Bad Gateway</h1>"),
        (b"", "empty body"),
        (b"[]", "[]"),
    ],
)
def test_every_known_error_body_is_read(body, message):
    assert api_error(400, body).message == message


async def test_plain_calls(wire, reply):
    wire.replies = [
        reply.response(b'{"data": [{"id": "one"}, {"id": "two"}]}'),
        reply.response(b'{"tokens": [1, 2, 3], "count": 3}'),
        reply.response(b'{"prompt": "text"}'),
        reply.response(b'{"choices": [{"text": "x"}]}'),
        reply.response(b"a 1\n", kind="text/plain"),
    ]
    async with AsyncClient(wire.url + "/v1/", "secret") as client:
        assert await client.models() == ["one", "two"]
        assert await client.tokenize("text", add_special_tokens=False) == [1, 2, 3]
        assert await client.detokenize([1, 2, 3]) == "text"
        assert (await client.completions({"prompt": "p"}))["choices"][0]["text"] == "x"
        assert await client.metrics() == "a 1\n"
    assert [line.split()[1] for line, _, _ in wire.requests] == [
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/v1/completions",
        "/metrics",
    ]
    assert all(headers["authorization"] == "Bearer secret" for _, headers, _ in wire.requests)
    assert msgspec.json.decode(wire.requests[1][2]) == {"prompt": "text", "add_special_tokens": False}
    assert msgspec.json.decode(wire.requests[2][2]) == {"tokens": [1, 2, 3]}


async def test_an_answer_that_is_no_json_object_is_an_error(wire, reply):
    wire.replies = [reply.response(b"<html>")]
    async with AsyncClient(wire.url) as client:
        with pytest.raises(ClientError, match="JSON object"):
            await client.models()


async def test_timeout_bounds_the_whole_call(wire, reply):
    for limit in (1, 10, 100):  # on a machine that stands still, the first may be over before anything has come
        wire.replies = [reply.stream(token("a"), reply.PAUSE), [reply.PAUSE]]
        async with AsyncClient(wire.url, timeout=limit) as client:
            with pytest.raises((BrokenStreamError, UnreachableError)) as told:
                await collect(client)
            if told.type is BrokenStreamError:
                break
    async with AsyncClient(wire.url, timeout=1) as client:
        with pytest.raises(UnreachableError):
            await client.chat(BODY)
    assert told.type is BrokenStreamError


async def test_wait_ready_waits_while_the_server_loads(wire, reply):
    wire.replies = [reply.response(b"{}", "503 Service Unavailable"), reply.response(b"")]
    async with AsyncClient(wire.url) as client:
        assert await client.wait_ready(300) > 0.1
    assert [line for line, _, _ in wire.requests] == ["GET /health HTTP/1.1"] * 2


async def test_wait_ready_asks_for_the_models_where_there_is_no_health_endpoint(wire, reply):
    wire.replies = [reply.response(b"{}", "404 Not Found"), reply.response(b'{"data": []}')]
    async with AsyncClient(wire.url) as client:
        assert await client.wait_ready(300) > 0


async def test_wait_ready_gives_up():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with AsyncClient(f"http://127.0.0.1:{unused.getsockname()[1]}") as client:
            with pytest.raises(UnreachableError, match="not ready after"):
                await client.wait_ready(0.3)


def refusal(status: int, retry_after: str = "0") -> bytes:
    body = b'{"error": {"message": "later"}}'
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nRetry-After: {retry_after}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def test_what_the_server_did_not_begin_is_tried_again(wire, reply):
    wire.replies = [[refusal(503)], [refusal(429)], reply.stream(token("a"), b"data: [DONE]\n\n")]
    async with AsyncClient(wire.url, retries=2) as client:
        assert [content(chunk) for chunk in await collect(client)] == ["a"]
    wire.replies = [[refusal(503)], [refusal(503)], []]
    async with AsyncClient(wire.url, retries=1) as client:
        with pytest.raises(APIError, match="later"):
            await collect(client)
    assert len(wire.replies) == 1


async def test_what_may_have_been_begun_is_not_tried_again(wire, reply):
    done = reply.stream(token("a"), b"data: [DONE]\n\n")
    wire.replies = [[None], done, [refusal(500)], done]
    async with AsyncClient(wire.url, retries=3) as client:
        with pytest.raises(UnreachableError):
            await collect(client)
        await collect(client)
        with pytest.raises(APIError):
            await collect(client)
    assert len(wire.replies) == 1


async def test_a_server_that_is_not_there_yet_is_tried_again(monkeypatch):
    waits, sleep, here = [], asyncio.sleep, threading.get_ident()

    async def no_sleep(seconds):
        if threading.get_ident() != here:  # servers of other tests, in threads of this process
            return await sleep(seconds)
        waits.append(seconds)

    monkeypatch.setattr("slipstream.clients.http.asyncio.sleep", no_sleep)
    with socket.socket() as taken:  # which does not listen, and keeps others from doing so
        taken.bind(("127.0.0.1", 0))
        async with AsyncClient(f"http://127.0.0.1:{taken.getsockname()[1]}", retries=2) as client:
            with pytest.raises(UnreachableError):
                await client.models()
    assert [wait for wait in waits if wait] == [0.5, 1.0]
