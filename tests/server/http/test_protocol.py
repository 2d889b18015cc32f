"""Time limits of a connection, shortened."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from slipstream.server.app import error_response
from slipstream.server.errors import ApiError
from slipstream.server.http import body, protocol
from slipstream.server.http.held import HeldBytes
from slipstream.server.responses import LargeResponse


@pytest.fixture
def quick_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """No head comes in time."""
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)


@pytest.fixture
def quick_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.2)


@contextlib.asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[int]:
    config = uvicorn.Config(app, http=protocol.HttpProtocol, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.server.ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol.HttpProtocol(config, state, {}), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Where a server listens that reads bodies; it waits for what ``quick_head`` and ``quick_body`` do not shorten."""
    for module, name in ((protocol, "HEAD_TIMEOUT_S"), (body, "BODY_TIMEOUT_S")):
        if getattr(module, name) > 0.2:
            monkeypatch.setattr(module, name, 300)
    app = FastAPI()

    @app.post("/")
    async def size(request: Request) -> dict[str, int]:
        try:
            return {"size": len(await body.read_body(request, 100))}
        except ApiError as error:
            return {"status": error.status}

    async with serving(app) as port:
        yield port


async def say(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Everything the server answers until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(pause)
        received = b""
        while chunk := await asyncio.wait_for(reader.read(65536), 300):
            received += chunk
        return received
    finally:
        writer.close()
        await writer.wait_closed()


def answer(received: bytes) -> Any:
    return json.loads(received.partition(b"\r\n\r\n")[2])


async def test_a_slow_head_is_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
    assert await reader.readuntil(b"}")
    # The time of the second head begins with its first bytes, so that they never come too late.
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    writer.write(b"POST / HTTP/1.1\r\nHost: ")
    received = await asyncio.wait_for(reader.read(), 300)
    assert received.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert answer(received)["error"]["code"] == "request_too_slow"
    writer.close()
    await writer.wait_closed()


async def test_a_connection_without_a_request_is_closed_silently(quick_head: None, port: int) -> None:
    assert await say(port) == b""


async def test_a_slow_body_is_refused(quick_body: None, port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 50\r\n\r\n"
    assert answer(await say(port, head, b"abc", pause=0.15)) == {"status": 408}


async def test_a_head_in_pieces_within_the_limit(port: int) -> None:
    pieces = (b"POST / HTTP/1.1\r\n", b"Host: x\r\nConnection: close\r\nContent-", b"Length: 3\r\n\r\nabc")
    assert answer(await say(port, *pieces, pause=0.04)) == {"size": 3}


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n"


@pytest.mark.parametrize(
    "filler", [b"X-Long: " + b"a" * 70_000, b"\r\n".join([b"X-Many: a"] * 7_000)], ids=["long", "many"]
)
@pytest.mark.parametrize(
    "first", [b"", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"], ids=["new", "kept"]
)
async def test_a_large_head_is_refused_also_if_it_comes_at_once(port: int, filler: bytes, first: bytes) -> None:
    received = await say(port, first + HEAD + filler + b"\r\n\r\nabc")
    assert received.count(b"HTTP/1.1 431 ") == 1 and b"head_too_large" in received


async def test_the_body_before_does_not_count_as_a_part_of_a_head() -> None:
    app = FastAPI()

    @app.post("/")
    async def size(request: Request) -> dict[str, int]:
        return {"size": len(await request.body())}

    async with serving(app) as port:
        first = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"a" * 100_000
        received = await say(port, first + HEAD[:30], HEAD[30:] + b"\r\nabc", pause=0.04)
    assert b'{"size":100000}' in received and received.endswith(b'{"size":3}')


@contextlib.asynccontextmanager
async def waiting() -> AsyncIterator[SimpleNamespace]:
    """A server whose answer waits for ``may_answer``; ``gone`` is set when the client of a request has gone."""
    app, may_answer, gone = FastAPI(), asyncio.Event(), asyncio.Event()

    @app.post("/")
    async def wait(request: Request) -> dict[str, bool]:
        await request.body()
        asked = [asyncio.create_task(may_answer.wait()), asyncio.create_task(request.receive())]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        if not may_answer.is_set():
            gone.set()
        asked[1].cancel()
        return {"ok": True}

    async with asyncio.timeout(300), serving(app) as port:
        yield SimpleNamespace(port=port, may_answer=may_answer, gone=gone)


async def test_who_ends_its_side_gets_the_answer_to_a_whole_request() -> None:
    async with waiting() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HEAD + b"\r\nabc")
        writer.write_eof()
        signs = await reader.readexactly(3 * len(protocol.STILL_WORKING))
        assert signs == 3 * protocol.STILL_WORKING and not server.gone.is_set()
        server.may_answer.set()
        received = await reader.read()
        assert received.removeprefix(protocol.STILL_WORKING).startswith(b"HTTP/1.1 200 ")
        assert received.endswith(b'{"ok":true}')
        writer.close()


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_who_goes_before_the_answer_is_noticed(version: bytes) -> None:
    async with waiting() as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HEAD.replace(b"1.1", version) + b"\r\nabc")
        await writer.drain()
        writer.close()
        await server.gone.wait()


@pytest.mark.parametrize("sent", [b"", b"POST / HT", HEAD, HEAD + b"\r\nab"])
async def test_who_ends_its_side_before_the_request_is_whole_gets_nothing(port: int, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 300) == b""
    writer.close()


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
"""What Java's HTTP client adds to the first request of a connection."""


@pytest.mark.parametrize(
    "offer", [OFFER, b"Connection: upgrade, close\r\nUpgrade: websocket\r\n"], ids=["java", "close"]
)
@pytest.mark.parametrize(
    "body",
    [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    ids=["length", "chunks"],
)
@pytest.mark.parametrize("cut", [0, 20, -8])
async def test_the_body_behind_an_offer_of_another_protocol_is_read(
    port: int, offer: bytes, body: bytes, cut: int
) -> None:
    first = b"POST / HTTP/1.1\r\nHost: x\r\n" + offer + body
    requests, sizes = first, [3]
    if b"close" not in offer:
        requests += b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab"
        sizes.append(2)
    place = cut % len(first)
    received = await say(port, requests[:place], requests[place:], pause=0.04)
    bodies = (each.partition(b"}")[0] + b"}" for each in received.split(b"\r\n\r\n")[1:])
    assert [json.loads(each)["size"] for each in bodies] == sizes


async def test_what_http_1_0_is_answered_has_no_chunks() -> None:
    app = FastAPI()

    @app.get("/{length}")
    async def numbers(length: str) -> StreamingResponse:
        headers = {"Content-Length": "4"} if length == "known" else {}
        return StreamingResponse(iter(("12", "", "34")), headers=headers)

    async with serving(app) as port:
        for path in (b"known", b"unknown"):
            received = await say(port, b"GET /" + path + b" HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert received.endswith(b"\r\n\r\n1234")
            assert b"transfer-encoding" not in received and b"connection: close" in received
            assert (await say(port, b"HEAD /" + path + b" HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        (bytes.fromhex("160301000601000002") + bytes(2), "TLS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"),
        (b"CONNECT x:80 HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", "no HTTP/1.1 request"),
    ],
)
async def test_other_protocols_are_named(port: int, sent: bytes, named: str) -> None:
    received = await say(port, sent)
    assert received.startswith(b"HTTP/1.1 400 ") and named in answer(received)["error"]["message"]


async def test_what_the_server_fails_at_is_not_the_clients_fault(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where no memory is left for a body: clients try again after 500, and never after 400."""

    def fail(self: protocol.HttpProtocol, body: bytes) -> None:
        raise MemoryError("no room for it")

    monkeypatch.setattr(protocol.HttpProtocol, "on_body", fail)
    received = await say(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc")
    assert received.startswith(b"HTTP/1.1 500 ")
    assert answer(received)["error"]["type"] == "server_error"
    assert "no room for it" in caplog.text


@pytest.mark.parametrize(
    ("method", "target", "status"), [("GET", "/" + "a" * 65_535, 431), ("CONNECT", "localhost:80", 400)]
)
async def test_targets_that_are_none_are_the_clients_fault(port: int, method: str, target: str, status: int) -> None:
    received = await say(port, f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert received.startswith(f"HTTP/1.1 {status} ".encode())


@contextlib.asynccontextmanager
async def large_answers(write_timeout_s: float = 300.0) -> AsyncIterator[SimpleNamespace]:
    """A server that answers 10 MB and takes three connections: its port, bytes it holds, its connections, and one entry
    for every client it has given up.
    """
    service = SimpleNamespace(answers=HeldBytes(15_000_000, "answers"), responding=contextlib.nullcontext)
    app = FastAPI()

    @app.get("/")
    async def much() -> Any:
        return LargeResponse(service, b"x" * 10_000_000)  # type: ignore[arg-type]

    @app.exception_handler(ApiError)
    async def on_error(request: Request, error: ApiError) -> Any:
        return error_response(error)

    cut: list[int] = []
    limits = protocol.ConnectionLimits(3, write_timeout_s, on_cut=lambda: cut.append(1))
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.server.ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol.HttpProtocol(config, state, {}, limits=limits), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield SimpleNamespace(port=port, held=service.answers, connections=state.connections, cut=cut)
    assert service.answers.total == 0


GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def sleeper(server: SimpleNamespace) -> AsyncIterator[None]:
    """A client that asks and does not read."""
    with socket.socket() as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asking.connect(("127.0.0.1", server.port))
        asking.sendall(GET)
        yield


async def test_what_is_not_read_leaves_no_room_for_others() -> None:
    async with large_answers() as server:
        async with sleeper(server):
            await until(lambda: server.held.total)
            assert (await say(server.port, GET)).startswith(b"HTTP/1.1 429 ")
        await until(lambda: not server.held.total)
    assert server.cut == []


async def test_who_does_not_read_is_given_up() -> None:
    async with large_answers(write_timeout_s=0.1) as server, sleeper(server):
        await until(lambda: server.cut and not server.held.total)
        assert server.cut == [1]


async def test_who_reads_gets_it_all() -> None:
    async with large_answers() as server:
        assert len((await say(server.port, GET)).partition(b"\r\n\r\n")[2]) == 10_000_000


async def test_connections_have_a_limit() -> None:
    async with large_answers() as server:
        others = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        assert answer(await say(server.port))["error"]["code"] == "too_many_connections"
        for _, writer in others:
            writer.close()
            await writer.wait_closed()
        await until(lambda: not server.connections)
        assert (await say(server.port, GET)).startswith(b"HTTP/1.1 200 ")


async def test_connections_end_with_the_server_and_no_request_is_lost() -> None:
    is_ending, may_answer = False, asyncio.Event()
    app = FastAPI()

    @app.get("/")
    async def wait() -> dict[str, bool]:
        await may_answer.wait()
        return {"ok": True}

    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.server.ServerState()
    limits = protocol.ConnectionLimits(is_ending=lambda: is_ending)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol.HttpProtocol(config, state, {}, limits=limits), "127.0.0.1", 0)
    keep = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with server, asyncio.timeout(300):
        new, begun, asked, idle = [
            await asyncio.open_connection(*server.sockets[0].getsockname()[:2]) for _ in range(4)
        ]
        may_answer.set()
        for reader, writer in (idle, begun):
            writer.write(keep)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"connection: close" not in head and await reader.readexactly(11) == b'{"ok":true}'
        may_answer.clear()
        begun[1].write(keep[:20])
        asked[1].write(keep)
        connections: Any = list(state.connections)
        while not (state.tasks and any(each.cycle and each._head_timer for each in connections)):
            await asyncio.sleep(0.01)

        is_ending = True
        for connection in connections:
            connection.end_after_answer()
        assert await idle[0].read() == b"", "closed at once"
        new[1].write(keep)
        begun[1].write(keep[20:])
        may_answer.set()
        for reader, _ in (new, begun, asked):
            received = await reader.read()
            assert b"connection: close" in received and received.endswith(b'{"ok":true}')
        for _, writer in (new, begun, asked, idle):
            writer.close()
