"""Real servers with real engines over real sockets: a tiny model in this process, the default one in processes."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.engine.operations import CheckIntegrity, Operation
from slipstream.engine.scheduling.scheduler import Scheduler
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.preparing import workers
from slipstream.server.testing import Document, ServerThread, write_tiny_model
from tests.ports import free_port
from tests.server.once import _tokenizers_are_read_once, policy  # noqa: F401 - fixtures

PATIENCE_S = 300.0
workers.WALL_S = PATIENCE_S  # text workers give way to whatever else runs here: it may take more than a minute
"""Far more than anything takes on a slow and busy machine: what waits so long waits for what never comes."""


MOST_TOKENS = 32_768
"""Most tokens of a request to the tiny model, which does a thousand in a second or so."""


class Client:
    """A plain HTTP client for a server; every answer is held against what the server says of its answers."""

    long = 2000
    """Tokens that take long."""

    def __init__(self, port: int, log: list[str]) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.headers: dict[str, str] = {}
        self.log = log
        self._document: Document | None = None

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        """The engine stands still: whatever is under way takes longer than any limit."""
        raise NotImplementedError

    def check_that_it_runs(self) -> None:
        """Fails if it has ended."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process that starts others."""
        raise NotImplementedError

    def hasten_worker(self) -> None:
        """Gives the training worker its share of the processor, where that is allowed.

        Else it gets what nobody else wants, and on a busy machine that is not enough to begin.
        """
        for child in psutil.Process(self.pid).children():
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

    def wait_until_ready(self) -> Self:
        def ready() -> bool:
            self.check_that_it_runs()
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
    def open_stream(self, **fields: Any) -> Iterator[socket.socket]:
        """A long stream of which at least one chunk has arrived; closing the socket is the client going away."""
        body = {"prompt": "Once upon a time", "max_tokens": self.long, "ignore_eos": True, "stream": True}
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

    def metric(self, *names: str, **labels: str) -> float:
        """The sum over the series of these names which have these labels; 0 if there are none."""
        total, wanted = 0.0, {f"slipstream:{name}" for name in names}
        for line in self.get("/metrics")[1].splitlines():
            series, _, value = line.rpartition(" ")
            found, _, rest = series.partition("{")
            if found in wanted and all(f'{key}="{text}"' in rest for key, text in labels.items()):
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
        self.wait_until(lambda: self.metric("num_requests_running", "num_requests_waiting", "kv_blocks_used") == 0)


class Server(Client):
    """A ``slipstream serve`` process."""

    def __init__(self, *options: str) -> None:
        super().__init__(free_port(), [])
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
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        [child] = [child for child in children if "slipstream.server.engine_process" in child.cmdline()]
        return child

    def check_that_it_runs(self) -> None:
        assert self.process.poll() is None, "".join(self.log)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        engine = self.engine
        engine.suspend()
        try:
            yield
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # the server may have ended it
                engine.resume()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code


class LocalServer(Client):
    """A server in threads of this process, of the tiny model unless told otherwise."""

    long = 8000

    def __init__(self, thread: ServerThread) -> None:
        self._thread = thread.start()
        self.service = thread.service
        super().__init__(int(thread.url.rpartition(":")[2]), thread.log)

    @property
    def pid(self) -> int:
        return os.getpid()

    def check_that_it_runs(self) -> None:
        assert self._thread.is_alive(), "".join(self.log)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        stands, go_on = threading.Event(), threading.Event()

        def stand_still(_: Scheduler) -> None:
            stands.set()
            assert go_on.wait(PATIENCE_S)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scheduler, "check_integrity", stand_still)
            done = self._thread.submit(self._thread.service.engine.call(CheckIntegrity()))
            try:
                assert stands.wait(PATIENCE_S)
                yield
            finally:
                go_on.set()
                done.result(PATIENCE_S)

    def run(self, coroutine: Any) -> Any:
        """What it returns in the server's event loop."""
        return self._thread.submit(coroutine).result(PATIENCE_S)

    def operate(self, operation: Operation[Any]) -> Any:
        return self.run(self.service.engine.call(operation))

    def stop(self) -> int:
        return self._thread.stop()


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
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tokenizer of the default model, and a context in which an answer can be long enough to look at it."""
    folder = tmp_path_factory.mktemp("model") / "tiny-model"
    folder.mkdir()
    write_tiny_model(folder, max_position_embeddings=MOST_TOKENS)
    return folder


@pytest.fixture(scope="session")
def start_tiny(start_server: Callable[..., Server], tiny_model: Path) -> Callable[..., Server]:
    """Starts ``slipstream serve`` with the tiny model and further options, for tests of what happens to processes."""
    return lambda *options: start_server("--model", str(tiny_model), "--threads", "1", *options)


@pytest.fixture(scope="session")
def start_local(tiny_model: Path) -> Iterator[Callable[..., LocalServer]]:
    """Starts servers in this process; arguments are fields of any configuration. All are ended with the session."""
    servers: list[LocalServer] = []

    def start(**fields: Any) -> LocalServer:
        options = {"model": str(tiny_model), "kv_cache_memory": "128MiB", **fields}
        configs: list[Any] = []
        for config in (ServerConfig, EngineConfig, TrafficConfig, EvolutionConfig):
            names = {field.name for field in dataclasses.fields(config)} & options.keys()  # type: ignore[arg-type]
            configs.append(config(**{name: options.pop(name) for name in names}))
        assert not options, f"no configuration has {options}"
        servers.append(LocalServer(ServerThread(*configs)).wait_until_ready())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start_local: Callable[..., LocalServer]) -> LocalServer:
    """With default options, and the context of the default model."""
    return start_local(max_model_len=8192)


@pytest.fixture(scope="session")
def small_server(start_local: Callable[..., LocalServer]) -> LocalServer:
    """With keys and narrow limits."""
    server = start_local(
        api_key=("first-key", "second-key"),
        served_model_name=("tiny", "alias"),
        **{"max_n": 4, "max_prompts": 4, "max_body_bytes": 20_000, "max_logprobs": 3},
        **{"max_running": 2, "max_queued_requests": 2, "max_model_len": 2048},
        **{"unknown_fields": "warn", "health_stall_s": 2.0},
    )
    server.headers = {"authorization": "Bearer first-key"}
    return server


@pytest.fixture(scope="session")
def default_server(start_server: Callable[..., Server]) -> Server:
    """A server of the default model, for tests of what it says."""
    return start_server().wait_until_ready()
