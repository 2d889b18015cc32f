"""A real server with the real engine and the default model, over a real socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream.server import app
from slipstream.server.admin import routes as admin_routes
from slipstream.server.description import ErrorAnswer
from slipstream.server.openai import routes as openai_routes

PATIENCE_S = 300.0
"""Far more than anything takes on a slow and busy machine: what waits so long waits for what never comes."""


PARAMETERS = {"name": ".+", "action": "[^/]+", "version": r"\d+", "other": r"\d+"}
"""Patterns of the parameters of paths."""


class Document:
    """An OpenAPI document, against which answers are held."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._paths = document["paths"]
        classes = (*openai_routes.DESCRIBED, *admin_routes.DESCRIBED, ErrorAnswer, app.Health, app.Version)
        self._classes = {found.__name__: found for found in classes}
        assert set(self._classes) <= set(document["components"]["schemas"])

    def operation(self, method: str, path: str) -> Any:
        path = urllib.parse.unquote(path.partition("?")[0])
        for template in sorted(self._paths, key=lambda template: template.count("{")):
            pattern = re.sub(r"\\{(\w+)\\}", lambda found: PARAMETERS[found[1]], re.escape(template))
            if re.fullmatch(pattern, path) and method in self._paths[template]:
                return self._paths[template][method]
        return None

    def check(self, method: str, path: str, status: int, headers: dict[str, str], body: bytes) -> None:
        operation = self.operation("get" if method == "HEAD" else method.lower(), path)
        kind = headers.get("content-type", "").partition(";")[0]
        if operation is None or method == "HEAD" or b'"unknown_route"' in body:
            if status >= 400 and body:
                ErrorAnswer.model_validate_json(body)
            return
        assert str(status) in operation["responses"], f"{method} {path} is not declared to answer {status}"
        content = operation["responses"][str(status)]["content"]
        assert kind in content, f"{method} {path} answers {status} with {kind}, not one of {list(content)}"
        if kind == "application/json":
            self._classes[content[kind]["schema"]["$ref"].rpartition("/")[2]].model_validate_json(body)
        elif kind == "text/event-stream":
            chunk = next(name for name in self._classes if name in content[kind]["schema"]["description"])
            for event in body.decode().removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
                data = event.removeprefix("data: ")
                (ErrorAnswer if data.startswith('{"error"') else self._classes[chunk]).model_validate_json(data)


class Server:
    """A ``slipstream serve`` process and a plain HTTP client for it."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.headers: dict[str, str] = {}
        self.log: list[str] = []
        self._document: Document | None = None
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "slipstream.server", "serve", "--port", str(self.port)),
                *("--kv-cache-memory", "128MiB", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # No option comes from the environment.
            env={k: v for k, v in os.environ.items() if k == "SLIPSTREAM_ISA" or not k.startswith("SLIPSTREAM_")},
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.log.extend(lines)

    @property
    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        [child] = [child for child in children if "slipstream.server.engine_process" in child.cmdline()]
        return child

    def hasten_worker(self) -> None:
        """Gives the training worker its share of the processor, where that is allowed.

        Else it gets what nobody else wants, and on a busy machine that is not enough to begin.
        """
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(OSError, psutil.Error):
                if any("training.worker" in word for word in child.cmdline()):
                    for thread in child.threads():
                        os.sched_setscheduler(thread.id, os.SCHED_OTHER, os.sched_param(0))
                    Path(f"/proc/{child.pid}/autogroup").write_text("0")

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.02)
        raise AssertionError(f"the condition did not come true in {timeout_s} s; log: {''.join(self.log)}")

    def wait_until_logged(self, *texts: str) -> str:
        """All of them, which take a moment from there to here; the log."""
        self.wait_until(lambda: all(text in "".join(self.log) for text in texts))
        return "".join(self.log)

    def wait_until_ready(self) -> Server:
        def ready() -> bool:
            assert self.process.poll() is None, "".join(self.log)
            with contextlib.suppress(OSError):
                return self.get("/ready")[0] == 200
            return False

        self.wait_until(ready)
        return self

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, self.headers | (headers or {}))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            answer = response.status, found, response.read()
        if path != "/openapi.json" and (document := self.document()):
            document.check(method, path, *answer)
        return answer

    def document(self) -> Document | None:
        """What the server says of its own answers; all that tests get are held against it."""
        if self._document is None:
            status, _, body = self.request("GET", "/openapi.json")
            self._document = Document(json.loads(body)) if status == 200 else None
        return self._document

    def get(self, path: str) -> tuple[int, Any]:
        status, headers, body = self.request("GET", path)
        return status, json.loads(body) if headers["content-type"] == "application/json" else body.decode()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        status, _, reply = self.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
        return status, json.loads(reply)

    def chat(self, text: str = "What is the capital of France?", **fields: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        status, reply = self.post("/v1/chat/completions", {"messages": messages, "temperature": 0, **fields})
        assert status == 200, reply
        return reply

    def complete(self, prompt: Any, **fields: Any) -> Any:
        status, reply = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        assert status == 200, reply
        return reply

    def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, decoded; the last one is the text [DONE]."""
        request = json.dumps({"temperature": 0, "stream": True, **body}).encode()
        status, headers, reply = self.request("POST", path, request, {"content-type": "application/json"})
        assert status == 200, reply
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        events = reply.decode().split("\n\n")
        assert events.pop() == ""
        assert all(event.startswith("data: ") for event in events)
        data = [event.removeprefix("data: ") for event in events]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The engine stands still: whatever is under way takes longer than any limit."""
        engine = self.engine
        engine.suspend()
        try:
            yield
        finally:
            engine.resume()

    @contextlib.contextmanager
    def open_stream(self, **fields: Any) -> Iterator[socket.socket]:
        """A long stream of which at least one chunk has arrived; closing the socket is the client going away."""
        body = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        body |= {"speculation": {"mode": "off"}, **fields}  # what repeats itself would be done too soon
        with self.send("/v1/completions", body) as connection:
            received = b""
            while b"data: " not in received:
                chunk = connection.recv(65536)
                assert chunk, received
                received += chunk
            yield connection

    def send(self, path: str, body: Any) -> socket.socket:
        """Sends a request and returns the connection without waiting for the answer."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        auth = "".join(f"\r\n{name}: {value}" for name, value in self.headers.items())
        connection.sendall(f"{head}{auth}\r\n\r\n".encode() + data)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the series of that name which have these labels; 0 if there are none."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            series, _, value = line.rpartition(" ")
            found, _, rest = series.partition("{")
            if found == f"slipstream:{name}" and all(f'{key}="{text}"' in rest for key, text in labels.items()):
                total += float(value)
        return total

    def counters(self) -> dict[str, float]:
        """All series that must never fall."""
        found: dict[str, float] = {}
        kinds: dict[str, str] = {}
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split()
                kinds[name] = kind
            elif line.startswith("slipstream:"):
                series, value = line.rsplit(" ", 1)
                name = series.split("{")[0]
                family = re.sub(r"_(bucket|sum|count)$", "", name)
                if kinds.get(name) == "counter" or kinds.get(family) == "histogram":
                    found[series] = float(value)
        return found

    def routes(self) -> dict[str, int]:
        """Version of the learned drafter by route."""
        lines = self.get("/metrics")[1].splitlines()
        gauges = [line for line in lines if line.startswith("slipstream:drafter_version{")]
        return {line.split('route="')[1].split('"')[0]: int(float(line.split()[-1])) for line in gauges}

    def wait_until_idle(self) -> None:
        self.wait_until(
            lambda: (
                self.metric("num_requests_running") + self.metric("num_requests_waiting") == 0
                and self.metric("kv_blocks_used") == 0
            )
        )

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code


def free_port() -> int:
    """Below those that the system gives to connections, which are many while tests run."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., Server]]:
    """Starts servers with the options given; all are ended with the session."""
    servers = []

    def start(*options: str) -> Server:
        servers.append(Server(*options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """With default options."""
    return start_server().wait_until_ready()


@pytest.fixture(scope="session")
def small_server(start_server: Callable[..., Server]) -> Server:
    """With keys and narrow limits."""
    server = start_server(
        *("--api-key", "first-key", "--api-key", "second-key"),
        *("--served-model-name", "tiny", "--served-model-name", "alias"),
        *("--max-n", "4", "--max-prompts", "4", "--max-body-bytes", "20000", "--max-logprobs", "3"),
        *("--max-running", "2", "--max-queued-requests", "2", "--max-model-len", "2048"),
        *("--unknown-fields", "warn", "--health-stall-s", "2"),
    )
    server.headers = {"authorization": "Bearer first-key"}
    return server.wait_until_ready()
