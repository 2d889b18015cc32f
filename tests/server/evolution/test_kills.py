"""kill -9 of a server that keeps traffic, trains and publishes: what it leaves is whole, and the next one goes on."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.traffic.store import TrafficStore
from slipstream.engine.config import EngineConfig

pytestmark = pytest.mark.slow
QUESTION = "What is the capital of France?"


class Evolving:
    """Servers one after the other over the same registry and traffic."""

    def __init__(self, folder: Path, start_server: Callable[..., Any]) -> None:
        self.folder = folder
        options = {
            **{"--registry": folder / "registry", "--traffic-log": "features", "--traffic-folder": folder / "traffic"},
            # Short rounds, so that many moments fall into publishing and trials.
            **{"--evolve": "always", "--evolve-first-tokens": 200, "--evolve-round-tokens": 1500},
            **{"--drafter": "cold", "--canary-share": 0.5, "--canary-requests": 20, "--max-draft-tokens": 3},
        }
        self._start = lambda: start_server(*(str(part) for pair in options.items() for part in pair))
        self.start()

    def start(self) -> None:
        self.server = self._start().wait_until_ready()
        self.process = psutil.Process(self.server.process.pid)

    def answer(self) -> Any:
        return self.server.chat(QUESTION, max_tokens=64)["choices"]

    @property
    def worker(self) -> psutil.Process | None:
        children = self.process.children()
        return next((child for child in children if any("training.worker" in word for word in child.cmdline())), None)

    @contextmanager
    def load(self, streams: int) -> Iterator[list[str]]:
        """Requests until the block is left; gives the errors there were."""
        over, failed = threading.Event(), []

        def stream(number: int) -> None:
            count = 0
            while not over.is_set():
                count += 1
                try:
                    self.server.chat(f"Tell me {count} facts about river number {number}.", max_tokens=24)
                except (OSError, ValueError, AssertionError) as error:
                    failed.append(repr(error))
                    time.sleep(0.1)

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(streams)]
        for thread in threads:
            thread.start()
        try:
            yield failed
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def check(self, fingerprint: str) -> Registry:
        """Registry and traffic are readable and whole."""
        registry = Registry(self.folder / "registry")
        versions = registry.list()
        for version in versions:
            registry.open_version(version.version, fingerprint)
        # What was being written has another name, which nothing loads.
        folders = {path for path in (registry.folder / "versions").iterdir() if path.name.isdecimal()}
        assert folders == {registry.path(version.version) for version in versions}
        assert sum(version.state == "live" for version in versions) <= 1
        for file in (registry.folder / "registry.sqlite", self.folder / "traffic" / "index.sqlite"):
            with closing(sqlite3.connect(file)) as database:
                assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        store = TrafficStore(self.folder / "traffic")
        assert all(len(sample.tokens) for sample in store.samples())
        store.close()
        return registry


@pytest.fixture
def evolving(tmp_path: Path, start_server: Callable[..., Any]) -> Iterator[Evolving]:
    made = Evolving(tmp_path, start_server)
    yield made
    made.server.stop()


def test_serving_does_not_notice_killed_workers(evolving: Evolving) -> None:
    server, rng = evolving.server, random.Random(0)
    answer = evolving.answer()
    with evolving.load(4) as failed:
        for kills in range(1, 6):
            worker = server.wait_until(lambda: evolving.worker)
            server.wait_until(lambda pid=worker.pid: os.sched_getscheduler(pid) == os.SCHED_IDLE)
            time.sleep(rng.uniform(0, 4))
            with suppress(psutil.NoSuchProcess):
                worker.kill()
            server.wait_until(lambda least=kills: server.metric("evolution_worker_restarts_total") >= least)
    assert not failed
    assert evolving.answer() == answer
    evolving.check(served_fingerprint(EngineConfig()))


def test_servers_killed_at_twenty_moments(evolving: Evolving) -> None:
    fingerprint, rng = served_fingerprint(EngineConfig()), random.Random(0)
    answer = evolving.answer()
    for number in range(20):
        with evolving.load(2):
            evolving.server.wait_until(lambda: evolving.server.metric("evolution_training_tokens_total"))
            time.sleep(rng.uniform(0, 8))
            processes = [evolving.process, *evolving.process.children(recursive=True)]
            # Every other time all its processes at once, as when the machine runs out of memory.
            for process in processes if number % 2 else processes[:1]:
                process.kill()
            evolving.server.process.wait(300)
            _, outliving = psutil.wait_procs(processes[1:], 300)
            assert not outliving
        live = evolving.check(fingerprint).live()
        evolving.start()
        assert evolving.answer() == answer
        if live is not None:
            loaded = lambda least=live.version: evolving.server.metric("drafter_version", route="") >= least  # noqa: E731
            evolving.server.wait_until(loaded)
    versions = evolving.check(fingerprint).list()
    assert len(versions) > 2 and any(version.state == "live" for version in versions)
