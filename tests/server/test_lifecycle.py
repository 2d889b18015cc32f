"""Starting, overload, clients that go away, time limits, faults and shutdown; whatever ends is a real process."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from slipstream.engine.operations import Pause, Resume
from tests.server.under_way import slow_steps, stopped_engine

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
# Without draft tokens: what repeats itself would be done too soon.
LONG = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "temperature": 0}
LONG |= {"speculation": {"mode": "off"}}


ENDLESS = {"max_tokens": 30_000}
"""For a server that ends before."""


@pytest.fixture(scope="module")
def narrow(start_local: Callable[..., Any]) -> Any:
    return start_local(max_running=2, max_queued_requests=2, health_stall_s=2.0)


@pytest.fixture(scope="module")
def process(start_tiny: Callable[..., Any]) -> Any:
    """Which the last test kills."""
    return start_tiny("--log-format", "json", "--access-log").wait_until_ready()


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"0\r\n\r\n") and (chunk := connection.recv(65536)):
        received += chunk
    return received


def loading(start_tiny: Callable[..., Any]) -> tuple[Any, psutil.Process]:
    """A server that loads its model for as long as the test takes, and its engine, which stands still."""

    def started() -> psutil.Process | None:
        server.check_that_it_runs()
        with contextlib.suppress(ValueError, psutil.Error):  # not there, or not what it will be
            found: psutil.Process = server.engine
            return found
        return None

    def is_listening() -> bool:
        server.check_that_it_runs()
        with contextlib.suppress(OSError):
            server.get("/version")
            return True
        return False

    for _ in range(5):  # who looks too late finds it loaded
        server = start_tiny()
        engine: psutil.Process = server.wait_until(started)
        engine.suspend()
        server.wait_until(is_listening)
        if server.get("/health")[1]["status"] == "loading":
            return server, engine
        go_on(engine)
        server.stop()
    raise AssertionError("it was always loaded by then")


def test_loading(start_tiny: Callable[..., Any]) -> None:
    server, engine = loading(start_tiny)
    try:
        for path in ("/health", "/ready"):
            status, reply = server.get(path)
            assert (status, reply["status"]) == (503, "loading")
        status, headers, body = server.request("GET", "/v1/models")
        assert (status, json.loads(body)["error"]["code"]) == (503, "loading")
        assert int(headers["retry-after"]) > 0
        status, reply = server.post(CHAT, {"messages": [{"role": "user", "content": "Hi"}]})
        assert (status, reply["error"]["code"]) == (503, "loading")
        assert server.request("GET", "/metrics")[0] == 200
    finally:
        go_on(engine)
    # Ctrl-C while loading ends both processes at once.
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(300) == 0
    assert not engine.is_running()


def test_disconnect_of_a_stream_frees_its_blocks(server: Any) -> None:
    server.wait_until_idle()
    aborted = server.metric("request_success_total", finished_reason="abort")
    with slow_steps(), server.open_stream(), server.open_stream(n=3):
        server.wait_until(lambda: server.metric("num_requests_running") == 4)  # two wait for the prompt of the third
        assert server.metric("kv_blocks_used") > 0
    server.wait_until_idle()
    assert server.metric("request_success_total", finished_reason="abort") == aborted + 4


def test_disconnect_without_streaming_frees_its_blocks(server: Any) -> None:
    server.wait_until_idle()
    with slow_steps(), server.send(COMPLETE, LONG | {"n": 2}):
        server.wait_until(lambda: server.metric("num_requests_running") == 2)
    server.wait_until_idle()


def test_overload(narrow: Any) -> None:
    rejected = narrow.metric("admission_rejections_total", reason="queue_full")
    with slow_steps(), contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(narrow.open_stream())
        for _ in range(2):
            stack.enter_context(narrow.send(COMPLETE, LONG))
        narrow.wait_until(lambda: narrow.metric("num_requests_waiting") == 2)
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        status, headers, reply = narrow.request("POST", COMPLETE, body, {"content-type": "application/json"})
        assert (status, json.loads(reply)["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) > 0
        assert narrow.get("/ready")[0] == 200
    narrow.wait_until_idle()
    assert narrow.metric("admission_rejections_total", reason="queue_full") == rejected + 1
    assert narrow.complete("x", max_tokens=1)["usage"]["completion_tokens"] == 1


def stream_that_takes_too_long(server: Any) -> str:
    """Its events; none if it had not even begun when its time was over, as where the machine is slow and busy."""
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(server.open_stream(n=2))
        except AssertionError as error:
            assert "request_timeout" in str(error)
            return ""
        with server.suspended():
            status, reply = server.post(COMPLETE, LONG | {"n": 2})
            assert (status, reply["error"]["code"]) == (504, "request_timeout")
            return read_all(stream).decode()


def test_request_timeout(start_local: Callable[..., Any]) -> None:
    for limit_s in (1.0, 10.0, 100.0):
        server = start_local(request_timeout_s=limit_s)
        started = time.monotonic()
        events = stream_that_takes_too_long(server)
        assert time.monotonic() - started >= limit_s
        if events:
            break
    *_, failed, done = [line for line in events.splitlines() if line.startswith("data: ")]
    assert json.loads(failed.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert done == "data: [DONE]"
    server.wait_until_idle()
    server.wait_until(lambda: server.post(COMPLETE, {"prompt": "x", "max_tokens": 1})[0] == 200)


def test_health_tells_when_the_engine_stalls(narrow: Any) -> None:
    narrow.wait_until_idle()
    with narrow.suspended():
        time.sleep(2.2)
        assert narrow.get("/health")[0] == 200  # nothing to do, so nothing is wrong
        assert narrow.metric("engine_stalled_seconds") == 0
        with narrow.send(COMPLETE, LONG):
            _, reply = narrow.wait_until(lambda: (found := narrow.get("/health"))[0] == 503 and found)
            assert reply["status"] == "stalled"
            assert "1 sequences" in reply["reason"]
            assert narrow.metric("engine_stalled_seconds") > 2
            assert narrow.get("/ready")[0] == 503
    narrow.wait_until(lambda: narrow.get("/health")[0] == 200)
    narrow.wait_until_idle()


def test_a_pause_is_no_stall(narrow: Any) -> None:
    narrow.wait_until_idle()
    expected = narrow.complete("x", max_tokens=3)["choices"]
    narrow.operate(Pause("keep"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(narrow.complete, "x", max_tokens=3)
        narrow.wait_until(lambda: narrow.metric("num_requests_waiting") == 1)
        assert narrow.metric("engine_paused") == 1
        enough = time.monotonic() + 2.5  # longer than --health-stall-s
        narrow.wait_until(lambda: narrow.service.engine.last_step_at > enough)  # it says that it is there
        narrow.wait_until(lambda: narrow.get("/health") == (200, {"status": "paused"}))
        narrow.wait_until(lambda: narrow.get("/ready")[0] == 200)
        narrow.operate(Resume())
        assert waiting.result(300)["choices"] == expected
    assert narrow.get("/health") == (200, {"status": "ok"})
    assert narrow.metric("engine_paused") == 0


def go_on(engine: psutil.Process) -> None:
    """Unless the server has ended it meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        engine.resume()


def replaced(server: Any) -> psutil.Process:
    """The engine that takes the place of one that was killed; it is not up, and stands still."""
    for _ in range(5):  # who looks too late finds it up
        killed = server.engine
        killed.kill()
        following = stopped_engine(server, killed.pid)
        if server.get("/health")[1]["status"] == "restarting":
            return following
        go_on(following)
        server.wait_until_ready()
    raise AssertionError("it was always up by then")


def test_a_low_limit_of_open_files_is_told(start_local: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few connections are left beside the server's own files, and whoever finds none is refused."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: None)
    server = start_local()
    assert "the limit of open files (ulimit -n) is 64, which leaves room for 1 connections" in "".join(server.log)


def test_a_signal_while_the_engine_is_replaced_ends_the_server_at_once(start_tiny: Callable[..., Any]) -> None:
    server = start_tiny("--engine-restarts", "5").wait_until_ready()
    engine = replaced(server)
    server.process.send_signal(signal.SIGTERM)
    go_on(engine)
    assert server.process.wait(300) == 0
    assert not engine.is_running()
    server.wait_until_logged("restart 1")


def begun(server: Any, engine: psutil.Process, stack: contextlib.ExitStack) -> tuple[socket.socket, int]:
    """The connection of a request that is under way, and its tokens; the engine stands still to the stack's end."""
    for tokens in (1000, 8000, 30_000):  # who looks too late finds it answered
        connection = stack.enter_context(server.send(COMPLETE, LONG | {"max_tokens": tokens}))

        def is_running() -> bool:
            return bool(server.metric("num_requests_running") == 1)

        def is_answered(connection: socket.socket = connection) -> bool:
            return bool(select.select([connection], [], [], 0)[0])

        server.wait_until(lambda: is_running() or is_answered())
        engine.suspend()
        stack.callback(go_on, engine)
        if is_running() and not is_answered():
            return connection, tokens
        go_on(engine)
        server.wait_until_idle()
    raise AssertionError("it was always answered by then")


HANGUP_IS_IGNORED = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
"""Under nohup, which is to keep what it starts."""


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.skipif(HANGUP_IS_IGNORED, reason="nohup keeps the server")),
    ],
)
def test_drain(start_tiny: Callable[..., Any], sent: signal.Signals) -> None:
    server = start_tiny("--drain-timeout-s", "300").wait_until_ready()
    engine = server.engine
    server.wait_until_logged("curl")
    with contextlib.ExitStack() as stack:
        running, tokens = begun(server, engine, stack)
        server.process.send_signal(sent)
        server.wait_until(
            lambda: server.get("/ready") == (503, {"status": "draining", "reason": "the server is shutting down"})
        )
        assert server.get("/health") == (200, {"status": "draining"})
        body = json.dumps({"prompt": "x"}).encode()
        status, headers, reply = server.request("POST", COMPLETE, body, {"content-type": "application/json"})
        assert (status, json.loads(reply)["error"]["code"]) == (503, "shutting_down")
        assert int(headers["retry-after"]) > 0
        go_on(engine)
        head, _, answer = read_whole(running).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert json.loads(answer)["usage"]["completion_tokens"] == tokens
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
def test_what_is_left_after_the_drain_ends_with_an_error(start_tiny: Callable[..., Any], how: str) -> None:
    server = start_tiny("--drain-timeout-s", "1" if how == "timeout" else "3600").wait_until_ready()
    engine = server.engine
    with server.open_stream(**ENDLESS) as stream, server.send(COMPLETE, LONG | ENDLESS) as whole:
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


def test_all_that_is_said_is_json_where_that_is_asked_for(process: Any) -> None:
    process.get("/version")
    log = process.wait_until_logged("(ready after ", "GET /version")
    records = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)


def test_memory_of_the_api_process(process: Any) -> None:
    for _ in range(20):  # what malloc keeps of bodies
        assert process.post(COMPLETE, {"prompt": "x" * 20_000, "temperature": 9})[0] == 400
    process.chat(max_tokens=5)
    resident = psutil.Process(process.process.pid).memory_info().rss
    # 63 MB of imports and 20 of the tokenizer, with what malloc keeps; torch has 200.
    assert resident < 140e6
    text = process.get("/metrics")[1]
    assert "process_resident_memory_bytes" in text
    assert "slipstream_engine_process_resident_memory_bytes" in text


def test_engine_ends_when_the_server_is_killed(process: Any) -> None:
    engine = process.engine
    process.process.kill()
    process.process.wait(300)
    process.wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
