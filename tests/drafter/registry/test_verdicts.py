"""What an engine says of a version it does not load: a verdict on the version only where something is wrong with it.

Whoever hears one takes the version back for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.head import layout
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import (
    ConfigError,
    MisfitError,
    ModelError,
    NoPlaceError,
    SlipstreamError,
    UnreadableError,
    kind_of,
)
from slipstream.engine.operations import SwapDrafter
from slipstream.engine.testing.local import LocalEngine


def swap(local: LocalEngine, path: Path, route: str = "") -> None:
    done = local.engine.operate(SwapDrafter(7, route, str(path)))
    while not done.done():
        local.engine.poll()
        time.sleep(0.001)
    done.result()


def test_what_says_nothing_about_a_version_is_no_verdict_on_it(
    target: Path, make_head: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = make_head(1)
    for name, change in (("first", {}), ("same", {}), ("other", {"norm_eps": 0.5})):
        layout.write(tmp_path / name, replace(config, **change), tensors)

    def engine(**fields: Any) -> LocalEngine:
        options = {"model": str(target), "kv_cache_memory": "4MiB", "drafter": str(tmp_path / "first")}
        config = EngineConfig(**(options | fields))
        return LocalEngine(config, make_drafters(config))

    local = engine(speculation="head", max_drafters=2)
    with pytest.raises(MisfitError, match="an engine that starts with it takes it"):
        swap(local, tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr("slipstream.drafter.head.drafter.available_memory", lambda device: 0)
        with pytest.raises(NoPlaceError, match="only 0 B of memory are free"):
            swap(local, tmp_path / "same", "canary")
    swap(local, tmp_path / "same", "canary")
    with pytest.raises(NoPlaceError, match="2 drafters are loaded"):
        swap(local, tmp_path / "same", "tenant:acme")
    with pytest.raises(NoPlaceError, match="runs no learned drafter"):
        swap(engine(speculation="ngram"), tmp_path / "same")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NoPlaceError, "failed"),
        (UnreadableError, "failed"),
        (SlipstreamError, "failed"),
        (ModelError, "refused"),
        (ConfigError, "refused"),
        (MisfitError, "misfit"),
    ],
)
def test_what_becomes_of_errors_on_their_way_from_an_engine(error: type[SlipstreamError], kind: str) -> None:
    assert kind_of(error("what is wrong")) == kind
