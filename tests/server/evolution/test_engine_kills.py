"""kill -9 of the engine at twenty moments under 16 streams, with evolution on; and of the server beside busy processes.

``pytest -m slow -s tests/server/evolution/test_engine_kills.py`` prints what was measured.
"""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest

from slipstream.drafter.registry.registry import Registry
from slipstream.engine.child import command

pytestmark = pytest.mark.slow
BUSY = command("timeit", "-n", "1000000000000", "pass")
"""Keeps a processor busy until it is killed, or who started it has ended, in whatever way."""
STREAMS, KILLS = 16, 20
MOST_S = 60.0
"""From a death to the error of a stream, to the next start, or to the end of all processes: far more than any takes on
a busy machine. What it takes is printed; what takes more was forgotten.
"""


class Stream:
    """A client that asks again and again, and notes when and how each of its streams ended."""

    def __init__(self, port: int, number: int) -> None:
        self.port, self.number = port, number
        self.over = threading.Event()
        self.ends: list[tuple[float, float, str]] = []
        """Begin, end, and the code of the error or nothing."""
        self.waits: list[tuple[float, float]] = []
        """Refused at this time, told to wait so long."""
        self.unexpected: list[str] = []
        self.tokens = 0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        count = 0
        while not self.over.is_set():
            count += 1
            try:
                self.ask(count)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.unexpected.append(repr(error))
                time.sleep(0.1)

    def ask(self, count: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        prompt = f"Tell me {count} facts about river number {self.number}."
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 48, "stream": True, "temperature": 0}
        began = time.monotonic()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                code = json.loads(answer.read())["error"]["code"]
                if (answer.status, code) != (503, "engine_failed"):
                    self.unexpected.append(f"{answer.status} {code}")
                self.ends.append((began, time.monotonic(), code))
                self.waits.append((time.monotonic(), float(answer.headers["retry-after"])))
                time.sleep(0.2)
                return
            code, done = "", False
            for line in answer:
                if line.startswith(b'data: {"error"'):
                    code = json.loads(line[6:])["error"]["code"]
                elif line.startswith(b"data: {"):
                    self.tokens += b'"content"' in line
                done = line.startswith(b"data: [DONE]") or done
            if not done or code not in ("", "engine_failed"):
                self.unexpected.append(f"ended with {code!r}, done: {done}")
            self.ends.append((began, time.monotonic(), code))
        finally:
            connection.close()


@contextmanager
def streams(port: int) -> Iterator[list[Stream]]:
    clients = [Stream(port, number) for number in range(STREAMS)]
    try:
        yield clients
    finally:
        for client in clients:
            client.over.set()
        for client in clients:
            client.thread.join()


def engine_of(server: Any) -> psutil.Process | None:
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.Error):
            if any("engine_process" in word for word in child.cmdline()):
                return child
    return None


def descendants(server: Any) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


@pytest.fixture
def server(tmp_path: Path, start_server: Callable[..., Any]) -> Iterator[Any]:
    made = start_server(
        *("--registry", str(tmp_path / "registry"), "--traffic-log", "features", "--max-draft-tokens", "3"),
        *("--traffic-folder", str(tmp_path / "traffic"), "--evolve", "always", "--drafter", "cold"),
        # Short rounds, so that publishing, trials and swaps happen all the time.
        *("--evolve-first-tokens", "200", "--evolve-round-tokens", "1500", "--canary-requests", "20"),
    )
    yield made.wait_until_ready()
    made.stop()


def test_engines_killed_at_twenty_moments(server: Any, tmp_path: Path) -> None:
    rng, registry = random.Random(0), Registry(tmp_path / "registry")
    began = time.monotonic()
    starts, back, errors, ready = list[float](), list[float](), list[float](), list[float]()
    fallen: set[str] = set()
    with streams(server.port) as clients:
        for number in range(KILLS):
            server.wait_until(lambda: server.get("/ready")[0] == 200)
            engine = server.wait_until(lambda: engine_of(server))
            time.sleep(rng.uniform(0, 6))
            if number % 4 == 3:  # as it takes over
                engine.kill()
                dead = engine.pid
                engine = server.wait_until(lambda dead=dead: (p := engine_of(server)) and p.pid != dead and p)
                time.sleep(rng.uniform(0, starts[-1]))
            before = server.counters()
            killed = time.monotonic()
            engine.kill()
            server.wait_until(lambda: server.get("/health")[1]["status"] in ("restarting", "failed"))
            server.wait_until(lambda: server.get("/ready")[0] == 200)
            ready.append(time.monotonic())
            took = ready[-1] - killed
            log = [line for line in server.log if "serves again after" in line][-1]
            starts.append(float(log.split("after ")[1].split(" s")[0]))
            back.append(took)
            after = server.counters()
            fallen |= {series for series, value in before.items() if after.get(series, value) < value}
            broken = [end - killed for c in clients for start, end, code in c.ends if start < killed < end and code]
            errors += broken
            print(
                f"kill {number}: ready again after {took:.1f} s, of which the start took {starts[-1]:.1f} s", end="; "
            )
            print(f"{len(broken)} streams had their error after {max(broken, default=0):.3f} s at most", flush=True)
            live = registry.live()
            if live is not None:
                server.wait_until(lambda least=live.version: server.routes().get("", 0) >= least)
    told = [wait - (next(r for r in ready if r >= at) - at) for c in clients for at, wait in c.waits if at <= ready[-1]]
    rolled = [e.reason for e in registry.history() if e.action == "rolled back" and "engine" in e.reason]
    first = next(line for line in server.log if "ready after" in line).split("ready after ")[1].split(")")[0]
    beyond = max(b - s for b, s in zip(back, starts, strict=True))
    print(f"{KILLS} kills in {time.monotonic() - began:.0f} s; the first start took {first}")
    print(f"ready again after {median(back):.1f} s in the median; at most {beyond:.2f} s more than the start took")
    print(f"{len(errors)} streams broken off, their errors after {median(errors):.3f} s, at most {max(errors):.3f} s")
    print(f"{len(told)} requests refused meanwhile, told to wait {median(told):.1f} s too long in the median")
    whole = sum(not code for client in clients for *_, code in client.ends)
    print(f"{whole} whole answers, {len(registry.list(pruned=True))} versions")
    assert not [said for client in clients for said in client.unexpected]
    assert fallen == set() and rolled == []
    assert server.metric("generation_tokens_total") > sum(client.tokens for client in clients) / 2
    assert beyond < MOST_S
    assert errors and max(errors) < MOST_S
    processes = descendants(server)
    assert server.stop() == 0
    assert psutil.wait_procs(processes, MOST_S)[1] == []


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_nothing_is_left_beside_eight_busy_processes(server: Any, how: str) -> None:
    with streams(server.port):
        server.wait_until(lambda: len(descendants(server)) == 3)  # engine, worker and its reaper
        busy = [subprocess.Popen(BUSY, start_new_session=True) for _ in range(8)]
        try:
            time.sleep(3)
            processes = descendants(server)
            assert len(processes) == 3
            began = time.monotonic()
            if how == "SIGKILL":
                server.process.kill()
                server.process.wait()
            else:
                assert server.stop() == 0
            ended = time.monotonic()
            _, left = psutil.wait_procs(processes, MOST_S)
            print(f"{how}: the server took {ended - began:.1f} s, its processes {time.monotonic() - ended:.2f} s more")
            assert not left
        finally:
            for process in busy:
                process.kill()
                process.wait()
