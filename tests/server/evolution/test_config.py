"""Options of evolution that do not go together, and routes on which no request could be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.testing.local import LocalEngine
from slipstream.server.evolution.config import EvolutionConfig, check_version_route
from slipstream.server.launch import with_live_drafter


def evolving(*routes: str, **fields: Any) -> EvolutionConfig:
    return EvolutionConfig(registry="drafters", evolve="idle", evolve_route=routes, **fields)


@pytest.mark.parametrize(
    "route", ["acme", "tenant:", "domain:", "lora:sql", "canary", "", "domain:a b", "domain:ü", "domain:" + "x" * 65]
)
def test_no_request_is_on_these_routes(route: str) -> None:
    with pytest.raises(ConfigError, match="--evolve-route"):
        evolving(route)


@pytest.mark.parametrize("route", ["tenant:a b/ü", "tenant:key/user:1", "domain:support/de", "domain:x.y_z-1:2"])
def test_odd_names_that_requests_have(route: str) -> None:
    assert evolving(route).evolve_route == (route,)


def test_a_route_is_trained_once_however_often_it_is_named() -> None:
    assert evolving("tenant:b", "domain:a", "tenant:b").evolve_route == ("tenant:b", "domain:a")


def test_a_registry_has_a_name() -> None:
    with pytest.raises(ConfigError, match="--registry is empty"):
        EvolutionConfig(registry="")


@pytest.mark.parametrize("speculation", ["off", "ngram", "ngram, suffix"])
def test_what_is_not_asked_to_draft_is_not_trained(speculation: str) -> None:
    engine = EngineConfig(speculation=speculation)
    with pytest.raises(ConfigError, match=f"--speculation {speculation} leaves out"):
        evolving().check_drafters(engine)
    EvolutionConfig(registry="drafters").check_drafters(engine)
    for drafts in ("auto", "head", "ngram, head"):
        evolving().check_drafters(EngineConfig(speculation=drafts, drafter="cold"))


def test_there_is_room_for_all_routes_and_a_trial() -> None:
    three = evolving("tenant:a", "tenant:b", "domain:c")
    with pytest.raises(ConfigError, match=r"--max-drafters 4 is not enough for 3 of --evolve-route: .* these are 5"):
        three.check_drafters(EngineConfig())
    three.check_drafters(EngineConfig(max_drafters=5))
    evolving("tenant:a", "tenant:b", "tenant:a").check_drafters(EngineConfig())
    evolving().check_drafters(EngineConfig(max_drafters=1))


@pytest.mark.parametrize("route", ["", "tenant:acme", "domain:code", "lora:sql"])
def test_versions_from_elsewhere_are_for_these(route: str) -> None:
    check_version_route(route, "route")


@pytest.mark.parametrize("route", ["acme", "canary", "lora:", "Tenant:acme", "domain:a b"])
def test_versions_from_elsewhere_that_would_serve_nobody(route: str) -> None:
    with pytest.raises(ConfigError, match=f"--route {route}: "):
        check_version_route(route, "route")


@pytest.mark.parametrize("drafter", [None, "cold"])
def test_a_head_that_is_still_to_learn_is_no_version_of_the_registry(
    drafter: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    """With the number of one, its draft tokens would be told, and drift be judged by them, as those of that version."""
    evolution = EvolutionConfig(registry=str(tmp_path / "registry"))
    engine = EngineConfig(model=str(tiny_model), speculation="head", drafter=drafter, kv_cache_memory="4MiB")
    config = with_live_drafter(engine, evolution)
    local = LocalEngine(config, make_drafters(config))
    assert [stats.routes for stats in local.engine.runner.speculator.stats] == [{"": 0}]
    local.close()
    others = with_live_drafter(EngineConfig(drafter="elsewhere"), evolution)
    assert others.drafter == "elsewhere"
