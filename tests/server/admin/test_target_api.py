"""Pauses and updates of the model's weights over HTTP, with the admin client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from slipstream.clients.admin import AdminClient
from slipstream.clients.errors import APIError
from tests.server.vllm.sending import with_weights

TEXT = "The quick brown fox"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def expected(start_local: Callable[..., Any], tiny_model: Path, tmp_path_factory: Any, policy: Any) -> list[Any]:
    """What servers say that begin with one or the other weights; and the folder of the second."""
    folder = with_weights(tiny_model, tmp_path_factory.mktemp("other") / "tiny-model", policy(1))
    said = [start_local(model=str(model)).complete(TEXT, max_tokens=8)["choices"] for model in (tiny_model, folder)]
    assert said[0] != said[1]
    return [*said, folder]


@pytest.fixture(scope="module")
def updated(start_local: Callable[..., Any]) -> Any:
    return start_local()


@pytest.fixture
async def admin(updated: Any) -> AsyncIterator[AdminClient]:
    async with AdminClient(updated.url) as client:
        yield client


async def say(server: Any) -> Any:
    return (await asyncio.to_thread(server.complete, TEXT, max_tokens=8))["choices"]


async def test_an_update_by_buckets_and_back_from_files(
    updated: Any, admin: AdminClient, policy: Any, expected: list[Any], tiny_model: Path
) -> None:
    assert await say(updated) == expected[0]
    await admin.begin_update(1, "keep")
    for name, tensor in policy(1).items():
        half = len(tensor) // 2
        for first, part in ((half, tensor[half:].clone()), (0, tensor[:half].clone())):
            await admin.fill(1, save({name: part}, metadata={"first_rows": json.dumps({name: first})}))
    assert await say(updated) == expected[0], "nothing of it can be seen before the end"
    report = await admin.finish_update(1)
    assert report["version"] == 1 and report["pause_seconds"] >= 0 < report["prepare_seconds"]
    assert await say(updated) == expected[1]
    assert (await admin.status())["server"]["target_version"] == 1
    await admin.begin_update(2)
    await admin.read(2, str(tiny_model))
    await admin.finish_update(2)
    assert await say(updated) == expected[0]


async def test_a_pause_lasts_until_it_is_resumed(updated: Any, admin: AdminClient) -> None:
    await admin.pause("wait")
    waiting = asyncio.create_task(say(updated))
    while (await admin.status())["requests"]["waiting"] != 1:
        await asyncio.sleep(0.02)
    status = (await admin.status())["server"]
    assert status["paused"] and status["health"] == {"status": "paused"} and not waiting.done()
    await admin.resume()
    await waiting
    assert not (await admin.status())["server"]["paused"]


async def test_what_is_wrong_is_refused_and_the_old_weights_stay(
    updated: Any, admin: AdminClient, policy: Any, expected: list[Any]
) -> None:
    before = await say(updated)

    async def refused(call: Any, *words: str) -> None:
        with pytest.raises(APIError) as caught:
            await call
        assert caught.value.status == 400 and all(word in str(caught.value) for word in words), caught.value

    await refused(admin.fill(9, save({NORM: policy(1)[NORM]})), "no update to version 9 is under way")
    await refused(admin.begin_update(0), "version")
    await refused(admin.begin_update(5, "sometimes"), "mode")  # type: ignore[arg-type]
    await admin.begin_update(5)
    await refused(admin.fill(5, b"no tensors"), "no safetensors file")
    await refused(admin.fill(5, b"\x02" + bytes(7) + b"[]" + b"x"), "no safetensors file")
    await refused(admin.fill(5, save({NORM: policy(1)[NORM]}, metadata={"first_rows": "[1]"})), "first_rows")
    await refused(admin.finish_update(5), "lacks")
    await refused(admin.read(5, str(expected[2] / "none.safetensors")), "cannot")
    await refused(admin.finish_update(5), "cannot be finished")
    await admin.cancel_update(5)
    await refused(admin.finish_update(5), "under way, but none")
    for query in ("", "?version=x", "?version=5&more=1", "?version=-1"):
        reply = updated.request(
            "POST", f"/admin/v1/target/fill{query}", b"", {"content-type": "application/octet-stream"}
        )
        assert reply[0] == 400, query
    for kind in ("application/json", "text/plain", ""):
        reply = updated.request("POST", "/admin/v1/target/fill?version=5", b"{}", {"content-type": kind})
        assert reply[0] == 415, kind
    assert await say(updated) == before


async def test_a_bucket_that_is_too_large_is_refused(start_local: Callable[..., Any]) -> None:
    server = start_local(max_body_bytes=1000)
    async with AdminClient(server.url) as admin:
        await admin.begin_update(1)
        with pytest.raises(APIError) as caught:
            await admin.fill(1, bytes(1001))
        assert caught.value.status == 413 and "--max-body-bytes" in str(caught.value)
