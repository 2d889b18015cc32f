"""What is decided where versions are damaged: there is always a way on. And nothing that is wrong with a registry ends
following it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from slipstream.drafter.head.config import config_for
from slipstream.drafter.registry.registry import DATABASE_FILE, Registry
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.messages import EngineStats
from slipstream.engine.models.config import decoder_config
from slipstream.engine.testing.local import TINY_LLAMA
from slipstream.server.evolution import evolution as evolutions
from slipstream.server.evolution import observer as observers
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.evolution.controller import Controller
from slipstream.server.evolution.evolution import Evolution
from slipstream.server.evolution.observer import Observer
from slipstream.server.evolution.wish import Refusal, Wish


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def add(registry: Registry) -> Callable[[], int]:
    """A candidate that has passed the gate."""
    head = config_for(decoder_config(TINY_LLAMA), 48)

    def add() -> int:
        return registry.add(head, b"weights", target="t", origin="trained", gate={"least_ratio": 1.1}).version

    return add


class Deciding:
    def __init__(self, registry: Registry) -> None:
        self.controller = Controller(registry, EvolutionConfig(registry=str(registry.folder)))

    def wish(self) -> Wish:
        return asyncio.run(self.controller.wish())

    def refuse(self, version: int, route: str, is_misfit: bool = False) -> None:
        asyncio.run(self.controller.refused(Refusal(version, route, "it is damaged", is_misfit)))


def test_a_version_on_trial_goes_live_when_the_one_beside_it_is_taken_back(
    registry: Registry, add: Callable[[], int]
) -> None:
    deciding = Deciding(registry)
    first, second = registry.promote(add()).version, add()
    assert deciding.wish().routes == {"": first, "canary": second}
    deciding.refuse(first, "")
    assert registry.live() is None
    wish = deciding.wish()
    assert wish.routes == {"": second} and wish.trial is None
    third = add()
    assert deciding.wish().routes == {"": second, "canary": third}


def test_what_is_sound_and_fits_another_server_is_not_blamed(registry: Registry, add: Callable[[], int]) -> None:
    deciding = Deciding(registry)
    first, second = registry.promote(add()).version, add()
    assert deciding.wish().trial is not None
    deciding.refuse(second, "canary", is_misfit=True)
    deciding.refuse(first, "", is_misfit=True)
    assert registry.get(second).state == "retired" and registry.get(first).state == "live"
    assert deciding.wish().routes == {"": first}


def test_a_version_that_was_made_live_by_force_keeps_no_other_waiting_where_there_is_nothing_to_compare_it_with(
    registry: Registry, add: Callable[[], int]
) -> None:
    deciding = Deciding(registry)
    first, second = registry.promote(add()).version, registry.promote(add()).version
    assert deciding.wish().routes == {"": second, "canary": first}
    deciding.refuse(first, "canary")
    wish = deciding.wish()
    assert wish.routes == {"": second} and wish.trial is None
    third = add()
    assert deciding.wish().routes == {"": second, "canary": third}


def test_following_a_registry_goes_on_whatever_is_in_it(
    registry: Registry, add: Callable[[], int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evolutions, "WISH_SECONDS", 0.01)
    version = add()

    def damage(value: object) -> None:
        with contextlib.closing(sqlite3.connect(registry.folder / DATABASE_FILE)) as database, database:
            database.execute("INSERT OR REPLACE INTO metrics VALUES (?, 'least_ratio', ?, 0)", (version, value))

    service = SimpleNamespace(
        observer=Observer(),
        engine=SimpleNamespace(failure=None, ready=SimpleNamespace(drafters=("head",))),
        engine_config=SimpleNamespace(drafter=None),
    )
    config = EvolutionConfig(registry=str(registry.folder))
    evolution = Evolution(cast(Any, service), config, TrafficConfig())

    async def follow() -> None:
        task = asyncio.create_task(evolution._follow())
        for value, is_wrong in (("nonsense", True), (0.5, False)):
            damage(value)
            while (evolution.error is not None) != is_wrong:
                assert not task.done()
                await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    damage("nonsense")
    asyncio.run(follow())
    assert caplog.text.count("drafter registry:") == 1 and "is tried again" in caplog.text
    assert caplog.messages[-1] == f"the drafter registry {registry.folder} can be used again"


def test_a_server_without_a_learned_drafter_decides_nothing(registry: Registry, add: Callable[[], int]) -> None:
    """Its engine would refuse one version after the other, and each would be taken back for good."""
    live, candidate = registry.promote(add()).version, add()
    service = SimpleNamespace(
        observer=Observer(),
        engine=SimpleNamespace(failure=None, ready=SimpleNamespace(drafters=("ngram",))),
        engine_config=SimpleNamespace(drafter=None),
    )
    evolution = Evolution(cast(Any, service), EvolutionConfig(registry=str(registry.folder)), TrafficConfig())

    async def follow() -> None:
        looks = 0
        original = evolution._train

        async def train(wanted: bool) -> None:
            nonlocal looks
            assert not wanted
            looks += 1
            await original(wanted)

        evolution._train = train  # type: ignore[method-assign]
        task = asyncio.create_task(evolution._follow())
        while looks < 3:
            evolution.poke()
            await asyncio.sleep(0)
            assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(follow())
    assert (registry.get(live).state, registry.get(candidate).state) == ("live", "candidate")
    assert not evolution.controller.in_control, "another server may be"


def test_a_clock_that_is_put_back_puts_no_point_before_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(time=lambda: 1e9, monotonic=lambda: 100.0)
    monkeypatch.setattr(observers, "time", clock)
    observer = Observer()
    observer.look(EngineStats(generation_tokens=0), 1)
    clock.time, clock.monotonic = lambda: 1e9 - 3600, lambda: 104.0
    observer.look(EngineStats(generation_tokens=20), 1)
    [point] = observer.points
    assert point.time == 1e9 - 3600 and point.tokens_per_second == 5.0
    clock.time, clock.monotonic = lambda: 1e9 - 7200, lambda: 107.0
    observer.look(EngineStats(generation_tokens=20), 1)
    assert [point.time for point in observer.points] == [1e9 - 7203, 1e9 - 7200]
