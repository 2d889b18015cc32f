"""The admin API of a real server: who may use it, what it does, what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.clients.admin import AdminClient
from slipstream.clients.errors import APIError
from slipstream.server.access.gate import is_local
from slipstream.server.http.headers import is_loopback

KEY = "an-admin-key"


@pytest.fixture
async def admin(evolving: Any) -> AsyncIterator[AdminClient]:
    async with AdminClient(evolving.url, KEY) as client:
        yield client


def status_of(server: Any, path: str = "/admin/v1/status", **headers: str) -> tuple[int, Any]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, body = server.request("GET", path, headers=sent)
    return status, json.loads(body).get("error", {}).get("code")


def test_keys_open_only_their_own_door(evolving: Any) -> None:
    assert status_of(evolving) == (403, "wrong_key"), "the key of users is none of the admin API"
    assert status_of(evolving, authorization="Bearer wrong") == (401, "invalid_api_key")
    assert status_of(evolving, authorization=f"Basic {KEY}") == (401, "invalid_api_key")
    assert status_of(evolving, "/admin/v1/no/such", authorization="Bearer wrong") == (401, "invalid_api_key")
    assert status_of(evolving, "/admin/v1/no/such", authorization=f"Bearer {KEY}") == (404, "unknown_route")
    assert status_of(evolving, authorization=f"Bearer {KEY}", x_forwarded_for="192.0.2.1")[0] == 200
    assert status_of(evolving, "/v1/models", authorization=f"Bearer {KEY}")[0] == 403
    assert evolving.request("GET", "/dashboard", headers={"authorization": ""})[0] == 200


def test_without_a_key_only_this_machine_may_ask(server: Any) -> None:
    assert status_of(server)[0] == 200
    assert status_of(server, origin=server.url)[0] == 200
    for headers in (
        {"x_forwarded_for": "127.0.0.1"},
        {"forwarded": "for=192.0.2.1"},
        {"via": "1.1 proxy"},
        {"origin": "http://elsewhere.example"},
        {"origin": "null"},
        {"host": "rebound.example"},
        {"host": "rebound.example", "origin": "http://rebound.example"},
    ):
        assert status_of(server, **headers) == (403, "admin_key_required"), headers


@pytest.mark.parametrize("client", [("192.0.2.1", 5), ("2001:db8::1", 5), ("::ffff:192.0.2.1", 5), None])
def test_other_machines_are_not_this_one(client: tuple[str, int] | None) -> None:
    scope = {"headers": [(b"host", b"localhost:8000")], "client": client}
    assert not is_local(scope)
    assert is_local(scope | {"client": ("::ffff:127.0.0.1", 5)}) and is_local(scope | {"client": ("::1", 5)})


def test_names_of_this_machine() -> None:
    for name in ("localhost", "localhost:80", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:80", "::1"):
        assert is_loopback(name), name
    for name in ("", "example.org", "10.0.0.1:80", "[2001:db8::1]", "localhost.example", "127.0.0.1.example:80"):
        assert not is_loopback(name), name


async def refused(call: Any, status: int, code: str, param: str | None = None) -> str:
    with pytest.raises(APIError) as caught:
        await call
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, param), caught.value
    return caught.value.message


async def test_the_life_of_a_version(admin: AdminClient, evolving: Any, heads: Path, tmp_path: Path) -> None:
    """One story, because each state comes from the one before."""
    first = await admin.import_drafter(str(heads / "fits"), note="from afar")
    number = first["version"]
    made = first["manifest"]
    assert (first["state"], made["note"], made["origin"]) == ("candidate", "from afar", "imported")
    assert "lineage 'run 7'" in made["target_name"], "the server's own, or it would refuse the version"
    of_the_files = await admin.import_drafter(str(heads / "fits"), target_lineage="")
    assert of_the_files["manifest"]["target"] != made["target"]
    second = (await admin.import_drafter(str(heads / "fits"), route="tenant:acme"))["version"]
    assert {number, second} <= {each["version"] for each in await admin.drafters()}
    assert [each["version"] for each in await admin.drafters("tenant:acme")] == [second]

    assert "hidden size" in await refused(admin.import_drafter(str(heads / "wrong")), 400, "invalid_value", "folder")
    for folder in ("a" * 256, "--help"):
        await refused(admin.import_drafter(folder), 400, "invalid_value", "folder")
    await refused(admin.import_drafter(str(heads / "fits"), target="b" * 256), 400, "invalid_value", "target")
    await refused(admin.import_drafter(str(heads / "fits"), route="acme"), 400, "invalid_value", "route")
    await refused(
        admin.export_drafter(first["version"], str(heads / "fits" / "config.json" / "x")),
        400,
        "invalid_value",
        "folder",
    )

    changed = await admin.change("promote", number, "to see it work")
    assert changed["drafter"]["state"] == "live" and changed["live"]["version"] == number
    assert (await admin.drafter(number))["history"][-1]["reason"] == "to see it work"
    evolving.wait_until(lambda: evolving.metric("drafter_version", route="") == number)
    found = await admin.status()
    assert found["evolution"]["routes"][""] == number
    assert (found["server"]["target_lineage"], found["server"]["target_version"]) == ("run 7", 0)
    events = found["evolution"]["events"]  # the worker may retire what is another model's meanwhile
    assert [event["action"] for event in events if event["version"] == number][-1] == "promoted"
    assert "is live" in await refused(admin.change("promote", number), 409, "illegal_transition")
    await refused(admin.change("rollback", second), 409, "illegal_transition")
    assert (await admin.change("retire", second))["drafter"]["state"] == "retired"

    difference = await admin.diff(number, second)
    assert difference["fields"]["route"] == ["", "tenant:acme"]
    assert set(difference["weights"].values()) == {0.0}

    done = await admin.export_drafter(number, str(tmp_path / "out"))
    assert done["version"] == number and (tmp_path / "out" / "model.safetensors").is_file()
    assert "not empty" in await refused(
        admin.export_drafter(number, str(tmp_path / "out")), 400, "invalid_value", "folder"
    )

    assert (await admin.change("pin", second))["drafter"]["pinned"] is True
    assert second not in await admin.prune(0)
    assert (await admin.change("unpin", second))["drafter"]["pinned"] is False
    assert second in await admin.prune(0)
    assert second not in {each["version"] for each in await admin.drafters()}
    assert second in {each["version"] for each in await admin.drafters(pruned=True)}
    await refused(admin.change("pin", second), 409, "illegal_transition")

    gone = await admin.change("rollback", number, "enough")
    assert gone["drafter"]["state"] == "rolled-back" and gone["live"] is None
    for state in ("rolled-back", "pruned"):
        evolving.wait_until(lambda state=state: evolving.metric("drafter_versions", state=state) >= 1)


async def test_a_sound_version_of_other_sizes_waits_for_an_engine_that_starts_with_it(
    admin: AdminClient, evolving: Any, heads: Path
) -> None:
    """Other servers on the registry may have one; here nothing drafts with it, and the reason is told."""
    failed = evolving.metric("drafter_failed_swaps_total")
    number = (await admin.import_drafter(str(heads / "small")))["version"]
    await admin.change("promote", number)
    evolving.wait_until(lambda: evolving.metric("drafter_failed_swaps_total") > failed)
    found = await admin.status()
    assert number not in found["evolution"]["routes"].values()
    assert (await admin.drafter(number))["drafter"]["state"] == "live"
    gone = await admin.change("rollback", number, "too small")
    assert gone["drafter"]["state"] == "rolled-back"


async def test_versions_that_are_not_there(admin: AdminClient) -> None:
    for number in (999, 2**70):
        await refused(admin.drafter(number), 404, "version_not_found")
        await refused(admin.change("promote", number), 404, "version_not_found")
        await refused(admin.change("rollback", number), 404, "version_not_found")
        await refused(admin.diff(number, 1), 404, "version_not_found")
    await refused(admin.export_drafter(999, "/tmp/x"), 404, "version_not_found")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("POST", "drafters/1/promote", {"because": "x"}, 400, "unknown_parameter", "because"),
        ("POST", "drafters/1/promote", {"reason": 5}, 400, "invalid_type", "reason"),
        ("POST", "drafters/1/applaud", {}, 404, "unknown_route", None),
        ("POST", "drafters/one/promote", {}, 404, "unknown_route", None),
        ("GET", "drafters/" + 5000 * "9", None, 404, "unknown_route", None),
        ("GET", "drafters/" + 100 * "9", None, 404, "version_not_found", None),
        ("GET", "drafters/1/promote", None, 405, "method_not_allowed", None),
        ("POST", "drafters/prune", {}, 400, "missing_required_parameter", "keep"),
        ("POST", "drafters/prune", {"keep": -1}, 400, "invalid_value", "keep"),
        ("POST", "drafters/import", {"folder": ""}, 400, "invalid_value", "folder"),
        ("POST", "drafters/import", {"folder": "a\0b"}, 400, "invalid_value", "folder"),
        ("POST", "drafters/import", {"folder": "a", "note": "a\0b"}, 400, "invalid_value", "note"),
        ("POST", "drafters/import", {"folder": "a", "route": "a\0b"}, 400, "invalid_value", "route"),
        ("POST", "drafters/import", {"folder": "a", "target": "a\0b"}, 400, "invalid_value", "target"),
        ("POST", "drafters/export", {"version": 1, "folder": "a\0b"}, 400, "invalid_value", "folder"),
        ("POST", "evolve", {"action": "stop"}, 400, "invalid_value", "action"),
        ("POST", "traffic/purge", {}, 400, "invalid_value", "tenant"),
        ("POST", "traffic/purge", {"tenant": "a", "all": True}, 400, "invalid_value", "tenant"),
        ("GET", "drafters?root=x", None, 400, "unknown_parameter", "root"),
        ("GET", "drafters?pruned=maybe", None, 400, "invalid_value", "pruned"),
    ],
)
def test_what_is_wrong_is_named(
    evolving: Any, method: str, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    sent = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    found, _, reply = evolving.request(method, f"/admin/v1/{path}", sent, headers)
    error = json.loads(reply)["error"]
    assert (found, error["code"], error["param"]) == (status, code, param), error


async def test_traffic_is_counted_and_purged(admin: AdminClient, evolving: Any) -> None:
    before = evolving.metric("traffic_samples_total", outcome="kept")
    evolving.complete("The sea is", max_tokens=8, ignore_eos=True, user="somebody")
    evolving.wait_until(lambda: evolving.metric("traffic_samples_total", outcome="kept") > before)
    assert (await admin.traffic())["somebody"]["samples"] == 1
    assert await admin.purge_traffic("nobody") == 0
    assert await admin.purge_traffic("somebody") == 1
    others = await admin.traffic()  # requests of other tests
    assert "somebody" not in others
    assert await admin.purge_traffic(None) == sum(each["samples"] for each in others.values())
    assert not await admin.traffic()


async def test_training_is_paused_and_asked_for(admin: AdminClient, evolving: Any) -> None:
    def is_waiting() -> bool:
        evolving.hasten_worker()
        return bool(evolving.metric("evolution_worker_state", state="waiting") == 1)

    evolving.wait_until(is_waiting)
    assert evolving.metric("evolution_worker_up") == 1
    assert (await admin.evolve("pause"))["paused"] is True
    worker = (await admin.status())["evolution"]["worker"]
    assert worker["paused"] is True
    assert "arithmetic" in worker["report"], "it has begun: its traffic is that of the server's model and lineage"
    assert (await admin.evolve("resume"))["paused"] is False
    assert (await admin.evolve("train"))["report"]["state"] in ("waiting", "gating", "paused")
    assert (await admin.evolve("judge"))["report"]["state"] in ("waiting", "gating", "paused")
    assert evolving.metric("evolution_worker_restarts_total") == 0


async def test_a_server_without_a_registry_says_so(server: Any) -> None:
    server.complete("One two three", max_tokens=20, ignore_eos=True)
    async with AdminClient(server.url) as admin:
        assert "--registry" in await refused(admin.drafters(), 409, "no_registry")
        assert "--registry" in await refused(admin.evolve("pause"), 409, "no_registry")
        assert "--traffic-log" in await refused(admin.traffic(), 409, "no_traffic")
        found = await admin.status()
    assert found["evolution"] is None and found["traffic"]["log"] == "off"
    assert found["requests"]["generation_tokens"] >= 20
    assert [drafter["name"] for drafter in found["drafters"]] == ["ngram", "suffix"]
    assert server.metric("drafter_versions") == 0
    assert "# TYPE slipstream:drafter_versions gauge" in server.get("/metrics")[1]


async def test_points_come_with_time(server: Any) -> None:
    async with AdminClient(server.url) as admin:
        server.complete("Once upon a time", max_tokens=60, ignore_eos=True)
        for _ in range(3000):
            points = (await admin.status())["points"]
            if any(point[1] > 0 and point[2] >= 1 for point in points):
                break
            await asyncio.sleep(0.1)  # a point stands for some seconds
    times = [point[0] for point in points]
    assert times == sorted(times)
    assert max(point[1] for point in points) > 0 and max(point[2] for point in points) >= 1
