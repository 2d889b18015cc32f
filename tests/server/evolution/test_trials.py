"""The registry decides what drafts: first versions, trials, rollbacks, what the engine refuses; on a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.drafter import warm
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import Version
from slipstream.engine.config import EngineConfig

Head = tuple[HeadConfig, dict[str, torch.Tensor]]
LINEAGE = "run 7"
"""Versions of it are served, the one that comes with Slipstream among them."""
PASSED = {"least_ratio": 1.1, "accept_length": 2.0}


@pytest.fixture(scope="module")
def good() -> Head:
    return warm.read(EngineConfig())


@pytest.fixture(scope="module")
def bad(good: Head) -> Head:
    """Its weights shuffled."""
    config, tensors = good
    generator = torch.Generator().manual_seed(0)

    def shuffle(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)

    return config, {name: shuffle(t) if t.ndim == 2 and name != warm.OUTPUT else t for name, t in tensors.items()}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def add(registry: Registry) -> Callable[..., Version]:
    fingerprint = served_fingerprint(EngineConfig(target_lineage=LINEAGE))

    def add(head: Head, target: str = fingerprint, **fields: Any) -> Version:
        return registry.add(*head, target=target, origin="trained", **fields)

    return add


@pytest.fixture(scope="module")
def server(registry: Registry, start_server: Callable[..., Any]) -> Any:
    return start_server(
        *("--registry", str(registry.folder), "--drafter", "warm", "--speculation", "head"),
        *("--speculation-policy", "fixed", "--max-draft-tokens", "3"),
        *("--canary-share", "0.5", "--canary-requests", "20", "--target-lineage", LINEAGE),
    ).wait_until_ready()


@pytest.fixture
def first(server: Any, registry: Registry) -> Iterator[Version]:
    """The live version, loaded, and nothing beside it when the test has ended."""
    found = registry.live()
    assert found is not None
    server.wait_until(lambda: server.routes() == {"": found.version})
    yield found
    for version in registry.list():
        if version.version != getattr(registry.live(), "version", None):
            if version.state in ("live", "canary"):
                registry.roll_back(version.route, "the test has ended", version=version.version)
            elif version.state == "candidate":
                registry.retire(version.version)


def ask(server: Any, number: int) -> tuple[str, list[int]]:
    """A greedy answer and the drafter versions that took part."""
    reply = server.chat(f"Tell me {number} facts about rivers.", max_tokens=12, return_metrics=True)
    return reply["choices"][0]["message"]["content"], reply["metrics"]["speculative_decoding"]["drafter_versions"]


def ask_until(server: Any, condition: Callable[[], bool], most: int) -> int:
    """Four streams of requests until the condition holds; how many it took."""
    with ThreadPoolExecutor(4) as pool:
        for count in range(0, most, 4):
            if condition():
                return count
            list(pool.map(lambda number: ask(server, number), range(count, count + 4)))
    assert condition(), f"not within {most} requests; the server said:\n" + "".join(server.log[-30:])
    return most


def test_a_version_proves_itself_or_goes(
    server: Any, registry: Registry, add: Callable[..., Version], first: Version, good: Head, bad: Head
) -> None:
    assert first.manifest.origin == "shipped"
    expected, versions = ask(server, 0)
    assert versions == [first.version]

    # Bad, but past the gate: on trial, and out again.
    worse = add(bad, gate=PASSED, parent=first.version)
    server.wait_until(lambda: server.routes() == {"": first.version, "canary": worse.version})
    assert ask(server, 0)[0] == expected
    ask_until(server, lambda: registry.get(worse.version).state == "rolled-back", 160)
    server.wait_until(lambda: server.routes() == {"": first.version})
    assert registry.live() == registry.get(first.version)

    # As good as the live one: on trial, and live. By design one in twenty is unlucky, so there are three of them.
    for _ in range(3):
        equal = add(good, gate=PASSED, parent=first.version)
        server.wait_until(lambda number=equal.version: server.routes() == {"": first.version, "canary": number})
        ask_until(server, lambda number=equal.version: registry.get(number).state != "canary", 160)
        if registry.get(equal.version).state == "live":
            break
    assert registry.get(equal.version).state == "live", registry.history(equal.version)[-1].reason
    server.wait_until(lambda: server.routes() == {"": equal.version})
    assert registry.get(first.version).state == "retired"

    # Bad, and made live by force: its predecessor comes back.
    forced = add(bad, parent=equal.version)
    registry.promote(forced.version, "by force")
    server.wait_until(lambda: server.routes() == {"": forced.version, "canary": equal.version})
    assert ask(server, 0)[0] == expected
    ask_until(server, lambda: registry.get(forced.version).state == "rolled-back", 160)
    server.wait_until(lambda: server.routes() == {"": equal.version})
    assert [event.action for event in registry.history(forced.version)][-1] == "rolled back"


def test_what_the_engine_refuses_is_taken_back(
    server: Any, registry: Registry, add: Callable[..., Version], first: Version, good: Head
) -> None:
    for spoil in ("truncated", "foreign"):
        version = add(good, gate=PASSED, **({"target": "sha256:other"} if spoil == "foreign" else {}))
        if spoil == "truncated":
            weights = registry.path(version.version) / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
        becomes = "retired" if spoil == "foreign" else "rolled-back"  # what is sound is not blamed
        server.wait_until(lambda number=version.version, state=becomes: registry.get(number).state == state)  # type: ignore[misc]
        assert server.routes() == {"": first.version}
        assert ask(server, 1)[1] == [first.version]
    assert "refused" in registry.history(version.version)[-1].reason


def test_a_route_of_its_own(
    server: Any, registry: Registry, add: Callable[..., Version], first: Version, good: Head
) -> None:
    registry.pin(first.version)
    own = add(good, gate=PASSED, route="domain:rivers")
    waiting = add(good, gate=PASSED, parent=first.version)
    server.wait_until(lambda: server.routes() == {"": first.version, "domain:rivers": own.version})
    body = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0, "return_metrics": True}
    headers = {"content-type": "application/json", "x-slipstream-domain": "rivers"}
    status, _, reply = server.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
    assert status == 200
    assert json.loads(reply)["metrics"]["speculative_decoding"]["drafter_versions"] == [own.version]
    # The shared one is pinned, which holds up no other route.
    assert registry.get(waiting.version).state == "candidate"
    # Nor does its trial.
    registry.unpin(first.version)
    server.wait_until(lambda: registry.get(waiting.version).state == "canary")
    other = add(good, gate=PASSED, route="domain:hills")
    server.wait_until(lambda: registry.get(other.version).state == "live")
    assert registry.get(waiting.version).state == "canary"


def test_of_several_decisions_the_latest_counts_and_none_is_one(
    server: Any, registry: Registry, add: Callable[..., Version], first: Version, good: Head
) -> None:
    expected, _ = ask(server, 0)
    versions = [add(good).version for _ in range(3)]
    for number in versions:
        registry.promote(number, "one after the other, while the one before is loaded")
    server.wait_until(lambda: server.routes().get("") == versions[-1])
    for number in reversed(versions):
        registry.roll_back(reason="and back", version=number)
    server.wait_until(lambda: server.routes() == {"": first.version})

    registry.record_metrics(first.version, {"trial": 1})
    registry.retire(first.version, "nothing is to draft")
    server.wait_until(lambda: server.routes() == {})
    reply = server.chat("Tell me 0 facts about rivers.", max_tokens=12)
    assert reply["choices"][0]["message"]["content"] == expected
    registry.promote(first.version, "and again")
    server.wait_until(lambda: server.routes() == {"": first.version})


def test_a_second_server_on_the_registry_follows_and_takes_over_when_the_first_ends(
    server: Any,
    registry: Registry,
    add: Callable[..., Version],
    first: Version,
    good: Head,
    start_server: Any,
    tmp_path: Path,
) -> None:
    learning = ("--evolve", "always", "--traffic-log", "features", "--traffic-folder", str(tmp_path))
    options = ("--registry", str(registry.folder), "--speculation", "head", "--target-lineage", LINEAGE)
    second = start_server(*options, *learning).wait_until_ready()
    try:
        second.wait_until(lambda: second.routes() == {"": first.version})
        assert (server.metric("drafter_registry_in_control"), second.metric("drafter_registry_in_control")) == (1, 0)

        def waits_for_the_other() -> bool:
            found = second.get("/admin/v1/status")[1]["evolution"]["worker"]["report"] or {"state": "", "message": ""}
            return found["state"] == "waiting" and "another server is in control" in found["message"].lower()

        second.wait_until(waits_for_the_other)
        assert second.metric("evolution_worker_up") == 0
        tried = add(good, gate=PASSED, parent=first.version)
        server.wait_until(lambda: server.routes() == {"": first.version, "canary": tried.version})
        # A version on trial is none of its business; what people decide is.
        registry.roll_back(reason="by hand", version=tried.version)
        forced = add(good)
        registry.promote(forced.version, "by hand")
        second.wait_until(lambda: second.routes() == {"": forced.version})
        assert second.metric("drafter_trial_version") == 0
        registry.roll_back(reason="by hand", version=forced.version)
        server.wait_until(lambda: server.routes() == {"": first.version})
        second.wait_until(lambda: second.routes() == {"": first.version})
        last = add(good, gate=PASSED, parent=first.version)
        registry.pin(first.version)  # no trial
        server.process.kill()
        second.wait_until(lambda: second.metric("drafter_registry_in_control") == 1)
        second.wait_until(lambda: second.metric("evolution_worker_up") == 1)
        machine = second.wait_until(lambda: second.get("/admin/v1/status")[1]["evolution"]["machine"])
        assert (
            machine["draft_seconds"]["1"] == sorted(machine["draft_seconds"]["1"]) and machine["step_seconds"]["1"] > 0
        )
        registry.unpin(first.version)
        second.wait_until(lambda: second.routes() == {"": first.version, "canary": last.version})
    finally:
        second.stop()
