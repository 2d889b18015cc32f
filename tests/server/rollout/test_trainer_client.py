"""A trainer pushes its weights with the client, every way there is; what the server has then is what was pushed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slipstream.clients.admin import AdminClient
from slipstream.clients.errors import APIError
from slipstream.clients.trainer import Trainer, buckets, whole_buckets
from tests.ports import free_port


@pytest.fixture(scope="module")
def server(start_local: Callable[..., Any]) -> Any:
    return start_local()


@pytest.fixture
async def admin(server: Any) -> AsyncIterator[AdminClient]:
    async with AdminClient(server.url) as client:
        yield client


async def push(trainer: Trainer, way: str, tensors: dict[str, Tensor], folder: Path) -> Any:
    match way:
        case "bodies":
            return await trainer.push(tensors)
        case "shared memory":
            return await trainer.push_shared(tensors)
        case "files":
            save_file(tensors, folder / "model.safetensors")
            return await trainer.push_files(folder)
    port = free_port()
    await trainer.join("weights", "127.0.0.1", port)
    try:
        return await trainer.push_group("weights", tensors)
    finally:
        await trainer.leave("weights")


async def test_of_two_trainers_with_the_same_numbers_the_later_has_its_turn(
    server: Any, admin: AdminClient, policy: Any
) -> None:
    """One that was started again counts its versions anew."""
    before = (await admin.status())["server"]["weight_version"]
    async with AdminClient(server.url) as again:
        await admin.begin_update(7)
        await again.begin_update(7)
        for call in (admin.begin_update(7), admin.read(7, "/nowhere"), admin.finish_update(7), admin.cancel_update(7)):
            with pytest.raises(APIError) as refusal:
                await call
            assert (refusal.value.status, refusal.value.code) == (409, "superseded")
        assert (await admin.status())["server"]["weight_version"] == before
        await Trainer(again, first_version=7).push(policy(1))
        await Trainer(admin).push(policy(0))


@pytest.mark.parametrize("way", ["bodies", "shared memory", "files", "group"])
async def test_every_way(admin: AdminClient, policy: Any, way: str, tmp_path: Path) -> None:
    trainer = Trainer(admin, first_version=3)
    tensors = policy(sum(map(ord, way)))
    assert await trainer.checksums(tensors) != await admin.checksums()
    report = await push(trainer, way, tensors, tmp_path)
    assert report["version"] == trainer.version == 3
    assert await admin.checksums() == await trainer.checksums(tensors)
    assert (await admin.status())["server"]["weight_version"] == "3"


async def test_some_tensors_and_a_push_that_fails(admin: AdminClient, policy: Any) -> None:
    trainer, tensors = Trainer(admin), policy(1)
    await trainer.push(tensors)
    name = "model.norm.weight"
    await trainer.push({name: tensors[name] + 1}, keep_rest=True)
    expected = await trainer.checksums(tensors | {name: tensors[name] + 1})
    assert trainer.version == 2 and await admin.checksums() == expected
    for wrong in ({name: tensors[name]}, {"model.nose": tensors[name]}):
        with pytest.raises(APIError):
            await trainer.push_shared(wrong)
    assert trainer.version == 2 and await admin.checksums() == expected
    await trainer.push(policy(2))
    assert trainer.version == 3


async def test_a_server_sleeps_and_wakes_up(server: Any, admin: AdminClient) -> None:
    before = await admin.checksums()
    assert await admin.sleep(["kv_cache"]) == ["kv_cache"]
    assert await admin.sleep() == ["kv_cache", "weights"]
    assert await admin.abort() == 0
    status = (await admin.status())["server"]
    assert status["released"] == ["kv_cache", "weights"] and status["health"]["status"] == "asleep"
    assert await admin.wake(["weights"]) == ["kv_cache"]
    assert await admin.wake() == [] and await admin.checksums() == before


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=6), st.integers(1, 300))
def test_buckets_hold_everything_once_and_are_small(shapes: list[tuple[int, int]], most: int) -> None:
    tensors = {
        str(at): torch.arange(float(rows * max(columns, 1))).view(*((rows, columns) if columns else (rows,)))
        for at, (rows, columns) in enumerate(shapes)
    }
    found = {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}
    for bucket, firsts in buckets(tensors, most):
        assert sum(part.nbytes for part in bucket.values()) <= most or len(bucket) == 1
        for name, part in bucket.items():
            first = firsts.get(name, 0)
            assert name in firsts or part.shape == tensors[name].shape
            assert bool((found[name][first : first + len(part)] == -1).all()), "rows come once"
            found[name][first : first + len(part)] = part
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    whole = list(whole_buckets(tensors, most))
    assert [name for bucket in whole for name in bucket] == list(tensors)


def test_a_number_alone_is_sent_too() -> None:
    """Some models have parameters without any dimension."""
    tensors = {"a": torch.ones(3), "scale": torch.tensor(2.0), "b": torch.ones(2, 2)}
    found = {name: part for bucket, _ in buckets(tensors, 100) for name, part in bucket.items()}
    assert found.keys() == tensors.keys() and torch.equal(found["scale"], tensors["scale"])
