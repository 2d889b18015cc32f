"""Clocks are put back and forward: what is kept, of whom, and by which weights it was answered does not go by them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.drafter.traffic import target_file
from slipstream.drafter.traffic.index import TrafficIndex
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.training.target import Serving

HOUR = 3600.0
Make = Callable[..., Sample]


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Puts the clock forward or back, by so many seconds from where it was at the beginning."""
    now = time.time

    def put(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + seconds)

    return put


@pytest.mark.parametrize("step", [-HOUR, HOUR])
def test_a_purge_reaches_what_arrived_before_it_and_nothing_else(
    step: float, tmp_path: Path, put: Any, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    tapped = tapped_engine(tmp_path / "t", config_for())
    tapped.submit(prompts(20)[0], tenant="alice")
    tapped.local.step()
    put(step)
    index = TrafficIndex(tmp_path / "t")
    index.purge("alice")
    put(0.0)
    while tapped.writer.last_purge < index.last_purge():  # the writer looks every second
        time.sleep(0.01)
    index.close()
    tapped.submit(prompts(21)[0], tenant="alice")
    tapped.submit(prompts(22)[0], tenant="bob")
    assert sorted(sample.num_prompt for sample in tapped.samples()) == [21, 22]


def test_purges_of_all_and_of_one_are_numbered_together(tmp_path: Path, make_sample: Make) -> None:
    store = TrafficStore(tmp_path / "t")
    assert store.index.last_purge() == 0
    for number, tenant in enumerate(["a", "b", "a", None, "a"], 1):
        store.purge(tenant)
        assert store.index.last_purge() == number
    kept = [store.append([make_sample(tenant=tenant, after_purge=n)]) for tenant in "ab" for n in (3, 4, 5)]
    assert kept == [0, 0, 1, 0, 1, 1]
    store.close()
    assert TrafficStore(tmp_path / "t").index.last_purge() == 5


def test_whose_answers_are_learned(tmp_path: Path, put: Any, config_for: Any, tapped_engine: Any, prompts: Any) -> None:
    """With an update's weights those that came after it; with the files' those of this engine."""
    folder = tmp_path / "t"
    put(HOUR)
    for files in ("before", "now"):
        before = TrafficStore(folder)
        before.index.claim("target", files)
        before.close()
    put(0.0)
    tapped = tapped_engine(folder, config_for())
    tapped.submit(prompts(20)[0])
    tapped.local.finish()
    tapped.submit(prompts(21)[0])  # answered by both
    tapped.local.step()
    put(-HOUR)
    engine = tapped.local.engine
    engine.scheduler.target_version = 1
    engine.listeners.target_changed(1, engine.loaded.model)
    tapped.local.finish()
    put(-2 * HOUR)
    tapped.submit(prompts(22)[0])
    samples = {sample.num_prompt: sample for sample in tapped.samples()}
    store = TrafficStore(folder, create=False)
    since = store.index.files_since()
    store.close()
    found = target_file.read(folder, "")
    assert found is not None and since > time.time() and found[0].since > time.time()
    of_files, of_update = Serving(None, since), Serving(found[0], since)
    assert [n for n in sorted(samples) if of_files.answered(samples[n])] == [20]
    assert [n for n in sorted(samples) if of_update.answered(samples[n])] == [22]
    assert [n for n in sorted(samples) if samples[n].features is not None] == [20, 22]
