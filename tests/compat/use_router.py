"""A router in front of servers, with its default options: ``use_router.py URL MODEL sglang|vllm``.

Where a server has to end, two others are started by the command in COMPAT_SERVE, which lacks the port only.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from checks import QUESTION, feature, run

KIND = sys.argv.pop(3)
TINY = os.environ.get("COMPAT_SERVED", "")
"""What those call their model."""
MODULES = {"sglang": "sglang_router.launch_router", "vllm": "vllm_router.launch_router"}


THREADS = 4
MOST_ATTEMPTS = 10
"""Failures after which routers leave a worker alone."""
TOKENS = 20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, f"{url}: ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{url}: not there after {seconds:g} s"
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            time.sleep(0.1)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)


def known(router: str) -> dict[str, str]:
    """The workers that a router sends requests to, by URL; what it calls each."""
    path = {"sglang": "/workers", "vllm": "/list_workers"}[KIND]
    with urllib.request.urlopen(router + path, timeout=30) as answer:
        found = json.load(answer)
    if KIND == "vllm":
        return {url: url for url in found["urls"]}
    return {each["url"]: each["id"] for each in found["workers"] if each["is_healthy"]}


@contextmanager
def worker() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of its own: its URL and process."""
    port = free_port()
    command = [*shlex.split(os.environ["COMPAT_SERVE"]), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/ready", process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(120)


@contextmanager
def routed(*urls: str) -> Iterator[str]:
    port = free_port()
    log = tempfile.TemporaryFile()  # noqa: SIM115  # ended below
    process = subprocess.Popen(
        [sys.executable, "-m", MODULES[KIND], "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        router = f"http://127.0.0.1:{port}"
        wait_for(f"{router}/readiness", process)
        # It is ready with one of its workers, and looks for the others meanwhile.
        wait_until(lambda: all(worker in known(router) for worker in urls))
        yield router
    except BaseException:
        log.seek(0)
        print(log.read().decode(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def post(url: str, path: str, body: Any) -> str:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        return str(urllib.request.urlopen(request, timeout=120).read().decode())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read()[:500]!r}") from None


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip


@feature("chat, completions, streamed")
def plain(url: str, model: str) -> None:
    with routed(url) as router:
        messages = [{"role": "user", "content": QUESTION}]
        found = json.loads(
            post(router, "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 8})
        )
        assert found["choices"][0]["message"]["content"]
        found = json.loads(post(router, "/v1/completions", {"model": model, "prompt": "One", "max_tokens": 8}))
        assert found["choices"][0]["text"]
        for path, body in (("/v1/chat/completions", {"messages": messages}), ("/v1/completions", {"prompt": "One"})):
            text = post(router, path, {"model": model, "max_tokens": 8, "stream": True, **body})
            assert text.rstrip().endswith("data: [DONE]"), text[-300:]


@feature("tools and structured output")
def structured(url: str, model: str) -> None:
    with routed(url) as router:
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 300}
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
        found = json.loads(post(router, "/v1/chat/completions", body | {"response_format": form}))
        assert json.loads(found["choices"][0]["message"]["content"])["city"] in ("Rome", "Bern")
        tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
        found = json.loads(post(router, "/v1/chat/completions", body | {"tools": [tool], "tool_choice": "required"}))
        assert found["choices"][0]["message"]["tool_calls"]


@feature("responses, embeddings")
def others(url: str, model: str) -> None:
    with routed(url) as router:
        found = json.loads(post(router, "/v1/responses", {"model": model, "input": QUESTION, "max_output_tokens": 8}))
        assert found["output"]
        assert json.loads(post(router, "/v1/embeddings", {"model": model, "input": "One"}))["data"]


class Load:
    """Requests through a router, one after the other in each of some threads; half of them are streams."""

    def __init__(self, router: str, model: str) -> None:
        self.outcomes: list[tuple[float, str]] = []
        """When each was sent, and what became of it; empty: it was answered as a whole."""
        self._router, self._model = router, model
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(THREADS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(300)

    def _ask(self, number: int) -> None:
        asked = 0
        while not self._over.is_set():
            asked += 1
            stream = asked % 2 == 0
            body = {"model": self._model, "prompt": f"{number} {asked}", "max_tokens": TOKENS, "ignore_eos": True}
            sent = time.monotonic()
            try:
                text = post(self._router, "/v1/completions", body | {"stream": stream})
                whole = text.rstrip().endswith("data: [DONE]") and '"error"' not in text
                whole = whole if stream else json.loads(text)["usage"]["completion_tokens"] == TOKENS
                self.outcomes.append((sent, "" if whole else text[-300:]))
            except Exception as error:
                self.outcomes.append((sent, f"{type(error).__name__}: {error}"))

    def count(self, since: float = 0.0) -> int:
        """How many that were sent later were answered as a whole."""
        return sum(not problem and sent >= since for sent, problem in self.outcomes)

    def wait(self, count: int, since: float = 0.0) -> None:
        deadline = time.monotonic() + 120
        while self.count(since) < count:
            assert time.monotonic() < deadline, self.outcomes[-5:]
            time.sleep(0.1)


def forget(router: str, worker: str) -> None:
    """Has a router send nothing more to a worker, as who drains one does; it has done so when this returns."""
    if KIND == "vllm":
        request = urllib.request.Request(f"{router}/remove_worker?url={worker}", b"", method="POST")
    else:
        request = urllib.request.Request(f"{router}/workers/{known(router)[worker]}", method="DELETE")
    urllib.request.urlopen(request, timeout=30).read()
    wait_until(lambda: worker not in known(router))  # the answer may only say that it will be done


@feature("a worker killed: the other answers")
def killed(url: str, model: str) -> None:
    with ExitStack() as stack:
        (first, process), (second, _) = stack.enter_context(worker()), stack.enter_context(worker())
        load = stack.enter_context(Load(stack.enter_context(routed(first, second)), TINY))
        load.wait(20)
        process.kill()
        process.wait()
        dead = time.monotonic()
        load.wait(60, dead)
        # What was under way is lost, and what routers still send there until they take it for dead.
        lost = [problem for _, problem in load.outcomes if problem]
        assert len(lost) <= THREADS + MOST_ATTEMPTS, lost
        assert not any(problem for _, problem in load.outcomes[-20:]), lost


@feature("a worker drained, and taken out before: no request is lost")
def drained(url: str, model: str) -> None:
    with ExitStack() as stack:
        (first, process), (second, _) = stack.enter_context(worker()), stack.enter_context(worker())
        router = stack.enter_context(routed(first, second))
        load = stack.enter_context(Load(router, TINY))
        load.wait(20)
        forget(router, first)
        load.wait(2 * THREADS, time.monotonic())  # so nothing that was meant for it is still on its way
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        load.wait(40, time.monotonic())
        lost = [problem for _, problem in load.outcomes if problem]
        assert not lost, lost


if __name__ == "__main__":
    run()
