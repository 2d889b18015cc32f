"""Starting, overload, clients that go away, time limits, faults and shutdown, each with the real processes."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
# Without guesses: what repeats itself would be done too soon.
LONG = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
LONG |= {"speculation": {"mode": "off"}}


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"0\r\n\r\n") and (chunk := connection.recv(65536)):
        received += chunk
    return received


def test_loading(start_server: Callable[..., Any]) -> None:
    server = start_server()

    def is_listening() -> bool:
        with contextlib.suppress(OSError):
            server.get("/version")
            return True
        return False

    server.wait_until(is_listening)
    for path in ("/health", "/ready"):
        status, reply = server.get(path)
        assert (status, reply["status"]) == (503, "loading")
    status, headers, body = server.request("GET", "/v1/models")
    assert (status, json.loads(body)["error"]["code"]) == (503, "loading")
    assert int(headers["retry-after"]) > 0
    status, reply = server.post(CHAT, {"messages": [{"role": "user", "content": "Hi"}]})
    assert (status, reply["error"]["code"]) == (503, "loading")
    assert server.request("GET", "/metrics")[0] == 200
    # Ctrl-C while loading ends both processes at once.
    engine = server.wait_until(lambda: psutil.Process(server.process.pid).children())[0]
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(300) == 0
    assert not engine.is_running()


def test_disconnect_of_a_stream_frees_its_blocks(server: Any) -> None:
    server.wait_until_idle()
    aborted = server.metric("request_success_total", finished_reason="abort")
    with server.open_stream(), server.open_stream(n=3):
        assert server.metric("num_requests_running") == 4
        assert server.metric("kv_blocks_used") > 0
    server.wait_until_idle()
    assert server.metric("request_success_total", finished_reason="abort") == aborted + 4


def test_disconnect_without_streaming_frees_its_blocks(server: Any) -> None:
    server.wait_until_idle()
    with server.send(COMPLETE, LONG | {"n": 2}):
        server.wait_until(lambda: server.metric("num_requests_running") == 2)
    server.wait_until_idle()


def test_overload(small_server: Any) -> None:
    rejected = small_server.metric("admission_rejections_total", reason="queue_full")
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(small_server.open_stream())
        for _ in range(2):
            stack.enter_context(small_server.send(COMPLETE, LONG))
        small_server.wait_until(lambda: small_server.metric("num_requests_waiting") == 2)
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        status, headers, reply = small_server.request("POST", COMPLETE, body, {"content-type": "application/json"})
        assert (status, json.loads(reply)["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) > 0
        assert small_server.get("/ready")[0] == 200
    small_server.wait_until_idle()
    assert small_server.metric("admission_rejections_total", reason="queue_full") == rejected + 1
    assert small_server.complete("x", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_request_timeout(start_server: Callable[..., Any]) -> None:
    server = start_server("--request-timeout-s", "5").wait_until_ready()
    started = time.monotonic()
    with server.open_stream(n=2) as stream, server.suspended():
        status, reply = server.post(COMPLETE, LONG | {"n": 2})
        assert (status, reply["error"]["code"]) == (504, "request_timeout")
        events = read_all(stream).decode()
    assert time.monotonic() - started >= 5
    *_, failed, done = [line for line in events.splitlines() if line.startswith("data: ")]
    assert json.loads(failed.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert done == "data: [DONE]"
    server.wait_until_idle()
    assert server.complete("x", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_health_tells_when_the_engine_stalls(small_server: Any) -> None:
    small_server.wait_until_idle()
    with small_server.suspended():
        time.sleep(2.2)
        assert small_server.get("/health")[0] == 200  # nothing to do, so nothing is wrong
        with small_server.send(COMPLETE, LONG):
            _, reply = small_server.wait_until(lambda: (found := small_server.get("/health"))[0] == 503 and found)
            assert reply["status"] == "stalled"
            assert "1 sequences" in reply["reason"]
            assert small_server.get("/ready")[0] == 503
    small_server.wait_until(lambda: small_server.get("/health")[0] == 200)
    small_server.wait_until_idle()


def test_a_signal_while_the_engine_is_replaced_ends_the_server_at_once(start_server: Callable[..., Any]) -> None:
    server = start_server().wait_until_ready()
    first = server.engine
    first.kill()
    server.wait_until(lambda: server.get("/health")[1]["status"] == "restarting")
    second = server.wait_until(lambda: [p for p in psutil.Process(server.process.pid).children() if p.pid != first.pid])
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(300) == 0
    assert not any(process.is_running() for process in second)
    server.wait_until_logged("restart 1")


def test_drain(start_server: Callable[..., Any]) -> None:
    server = start_server("--drain-timeout-s", "300").wait_until_ready()
    engine = server.engine
    server.wait_until_logged("curl")
    with server.send(COMPLETE, LONG | {"max_tokens": 300}) as running:
        server.wait_until(lambda: server.metric("num_requests_running") == 1)
        with server.suspended():  # so that it is not done before all is looked at
            server.process.send_signal(signal.SIGTERM)
            server.wait_until(
                lambda: server.get("/ready") == (503, {"status": "draining", "reason": "the server is shutting down"})
            )
            assert server.get("/health") == (200, {"status": "draining"})
            body = json.dumps({"prompt": "x"}).encode()
            status, headers, reply = server.request("POST", COMPLETE, body, {"content-type": "application/json"})
            assert (status, json.loads(reply)["error"]["code"]) == (503, "shutting_down")
            assert int(headers["retry-after"]) > 0
        head, _, answer = read_whole(running).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert json.loads(answer)["usage"]["completion_tokens"] == 300
    assert server.process.wait(300) == 0
    assert not engine.is_running()


def read_whole(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
        head, _, body = received.partition(b"\r\n\r\n")
        length = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
        if length and len(body) >= int(length[0].split(b":")[1]):
            break
    return received


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_what_is_left_after_the_drain_ends_with_an_error(start_server: Callable[..., Any], how: str) -> None:
    server = start_server("--drain-timeout-s", "1" if how == "timeout" else "3600").wait_until_ready()
    engine = server.engine
    with server.open_stream() as stream, server.send(COMPLETE, LONG) as whole:
        server.wait_until(lambda: server.metric("num_requests_running") == 2)
        server.process.send_signal(signal.SIGINT)
        if how == "second signal":
            server.wait_until(lambda: server.get("/ready")[0] == 503)
            server.process.send_signal(signal.SIGINT)
        *_, failed, done = [line for line in read_all(stream).decode().splitlines() if line.startswith("data: ")]
        assert json.loads(failed.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
        head, _, body = read_whole(whole).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after" in head
        assert json.loads(body)["error"]["code"] == "shutting_down"
    assert server.process.wait(300) == 0
    assert not engine.is_running()


def test_engine_ends_when_the_server_is_killed(start_server: Callable[..., Any]) -> None:
    server = start_server().wait_until_ready()
    engine = server.engine
    server.process.kill()
    server.process.wait(300)
    server.wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
