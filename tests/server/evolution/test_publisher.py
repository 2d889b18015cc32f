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


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def add(registry: Registry) -> Callable[..., Version]:
    fingerprint = served_fingerprint(EngineConfig())

    def add(head: Head, target: str = fingerprint, **fields: Any) -> Version:
        return registry.add(*head, target=target, origin="trained", **fields)

    return add


@pytest.fixture
def server(registry: Registry, tmp_path: Path, start_server: Callable[..., Any]) -> Iterator[Any]:
    made = start_server(
        *("--registry", str(tmp_path / "registry"), "--drafter", "warm", "--speculation", "head"),
        *("--canary-share", "0.5", "--canary-requests", "40", "--max-draft-tokens", "3"),
    )
    yield made.wait_until_ready()
    made.stop()


def ask(server: Any, number: int) -> tuple[str, list[int]]:
    """A greedy answer and the drafter versions that took part."""
    reply = server.chat(f"Tell me {number} facts about rivers.", max_tokens=40, return_metrics=True)
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


def loaded(server: Any) -> dict[str, int]:
    lines = server.get("/metrics")[1].splitlines()
    gauges = [line for line in lines if line.startswith("slipstream:drafter_version{")]
    return {line.split('route="')[1].split('"')[0]: int(float(line.split()[-1])) for line in gauges}


def test_a_version_proves_itself_or_goes(
    server: Any, registry: Registry, add: Callable[..., Version], good: Head, bad: Head
) -> None:
    first = registry.live()
    assert first is not None and first.manifest.origin == "shipped"
    server.wait_until(lambda: loaded(server) == {"": first.version})
    expected, versions = ask(server, 0)
    assert versions == [first.version]

    # Bad, but past the gate: on trial, and out again.
    worse = add(bad, gate=PASSED, parent=first.version)
    server.wait_until(lambda: loaded(server) == {"": first.version, "canary": worse.version})
    assert ask(server, 0)[0] == expected
    ask_until(server, lambda: registry.get(worse.version).state == "rolled-back", 320)
    server.wait_until(lambda: loaded(server) == {"": first.version})
    assert registry.live() == registry.get(first.version)

    # As good as the live one: on trial, and live. By design one in twenty is unlucky, so there are three of them.
    for _ in range(3):
        equal = add(good, gate=PASSED, parent=first.version)
        server.wait_until(lambda number=equal.version: loaded(server) == {"": first.version, "canary": number})
        ask_until(server, lambda number=equal.version: registry.get(number).state != "canary", 320)
        if registry.get(equal.version).state == "live":
            break
    server.wait_until(lambda: loaded(server) == {"": equal.version})
    assert registry.get(first.version).state == "retired"

    # Bad, and made live by force: its predecessor comes back.
    forced = add(bad, parent=equal.version)
    registry.promote(forced.version, "by force")
    server.wait_until(lambda: loaded(server) == {"": forced.version, "canary": equal.version})
    assert ask(server, 0)[0] == expected
    ask_until(server, lambda: registry.get(forced.version).state == "rolled-back", 320)
    server.wait_until(lambda: loaded(server) == {"": equal.version})
    assert [event.action for event in registry.history(forced.version)][-1] == "rolled back"


def test_what_the_engine_refuses_is_taken_back(
    server: Any, registry: Registry, add: Callable[..., Version], good: Head
) -> None:
    first = registry.live()
    assert first is not None
    for spoil in ("truncated", "foreign"):
        version = add(good, gate=PASSED, **({"target": "sha256:other"} if spoil == "foreign" else {}))
        if spoil == "truncated":
            weights = registry.path(version.version) / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
        server.wait_until(lambda version=version: registry.get(version.version).state == "rolled-back")  # type: ignore[misc]
        assert loaded(server) == {"": first.version}
        assert ask(server, 1)[1] == [first.version]
    assert "refused" in registry.history(version.version)[-1].reason


def test_a_route_of_its_own(server: Any, registry: Registry, add: Callable[..., Version], good: Head) -> None:
    first = registry.live()
    assert first is not None
    registry.pin(first.version)
    own = add(good, gate=PASSED, route="domain:rivers")
    waiting = add(good, gate=PASSED, parent=first.version)
    server.wait_until(lambda: loaded(server) == {"": first.version, "domain:rivers": own.version})
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
