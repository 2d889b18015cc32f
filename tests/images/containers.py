"""Servers in containers, as the proof of the images drives them."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_here import Docker, until

HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp:mode=1777")
START_SECONDS = 300
NUMBERS = itertools.count(1)


@dataclass
class Container:
    """One that serves; its port is published on loopback."""

    docker: Docker
    name: str
    port: int = 8000
    """Where it listens, inside."""

    @property
    def url(self) -> str:
        return f"http://{self.docker('port', self.name, str(self.port)).splitlines()[0]}"

    @property
    def state(self) -> Any:
        return self.docker.inspect(self.name)["State"]

    @property
    def log(self) -> str:
        done = self.docker.run("logs", self.name)
        return done.stdout + done.stderr

    def get(self, path: str, timeout: float = 10) -> tuple[int, str]:
        """Status and body; (0, why) without an answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, RuntimeError) as error:
            return 0, str(error)

    def post(self, path: str, body: dict[str, Any], timeout: float = 60) -> Any:
        """What is answered; raises urllib.error.HTTPError where it is an error."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def wait_until_ready(self, seconds: float = START_SECONDS) -> Container:
        """Raises AssertionError with the log if it ends, or takes too long."""

        def over() -> bool:
            return self.get("/ready")[0] == 200 or self.state["Status"] == "exited"

        with contextlib.suppress(TimeoutError):
            until(over, seconds, 0.25)
        assert self.state["Status"] == "running" and self.get("/ready")[0] == 200, f"{self.state}\n{self.log}"
        return self

    def wait_until_healthy(self, seconds: float = 60) -> None:
        with contextlib.suppress(TimeoutError):
            until(lambda: self.state["Health"]["Status"] == "healthy", seconds, 0.25)
        health = self.state["Health"]
        assert health["Status"] == "healthy", health

    def stream(self, question: str, max_tokens: int, **fields: Any) -> Stream:
        """A chat under way."""
        return Stream(
            self.url, {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens} | fields
        )

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series that have these labels."""
        status, page = self.get("/metrics")
        assert status == 200, page
        lines = (line for line in page.splitlines() if line.startswith(f"slipstream:{name}"))
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        fitting = (line for line in lines if line[len(f"slipstream:{name}")] in "{ " and all(w in line for w in wanted))
        return sum(float(line.rsplit(" ", 1)[1]) for line in fitting)


class Stream:
    """Reads a streamed chat in a thread."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.is_whole = False
        """All of it came, to the last line."""
        self.started = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url, body), daemon=True)
        self._thread.start()

    def join(self, seconds: float = 180) -> Stream:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the stream did not end"
        return self

    def _read(self, url: str, body: dict[str, Any]) -> None:
        data = json.dumps(body | {"stream": True}).encode()
        request = urllib.request.Request(url + "/v1/chat/completions", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                for line in answer:
                    if line.strip() == b"data: [DONE]":
                        self.is_whole = True
                    elif line.startswith(b"data: "):
                        [choice] = json.loads(line[6:])["choices"]
                        self.text += choice["delta"].get("content") or ""
                        self.finish_reason = choice["finish_reason"] or self.finish_reason
                        self.started.set()
        except Exception as error:  # what a client would see; the test says what may be
            self.error = repr(error)
        self.started.set()


@dataclass
class Containers:
    """Starts containers, and removes them in the end."""

    docker: Docker
    image: str
    started: list[str] = field(default_factory=list)

    def __call__(
        self, *options: str, image: str | None = None, arguments: tuple[str, ...] = (), port: int = 8000
    ) -> Container:
        """``options`` are those of `docker run`, ``arguments`` those of the server."""
        name = f"slipstream-proof-{next(NUMBERS)}-{time.time_ns() % 10**8}"
        self.started.append(name)
        published = ("-p", f"127.0.0.1::{port}")
        self.docker("run", "-d", "--name", name, *published, *options, image or self.image, *arguments)
        return Container(self.docker, name, port)

    def remove(self) -> None:
        for name in self.started:
            self.docker.run("rm", "-f", "-v", name)
        self.started.clear()


def revision(tree: Path) -> str:
    """The commit; a copy of a tree has none."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
