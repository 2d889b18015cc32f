"""Updates of which a part cannot be taken; pauses for as long as an update needs them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from slipstream.engine.operations import FillTargetShared, ReadTarget
from slipstream.server.errors import ConflictError
from slipstream.server.rollout import sources
from slipstream.server.rollout.control import Control
from tests.server.sglang.calls import shared

Part = dict[str, Tensor]
NORM = "model.norm.weight"
BAD: Part = {NORM: torch.zeros(3)}


@pytest.fixture(scope="module")
def server(start_local: Callable[..., Any]) -> Any:
    return start_local()


@pytest.fixture
def control(server: Any) -> Iterator[Control]:
    yield server.service.control
    server.run(server.service.control.resume())


def post(server: Any, path: str, body: Any = None, status: int = 200) -> Any:
    found, answer = server.post(path, body or {})
    assert found == status, answer
    return answer


def send_to_sglang(server: Any, part: Part, status: int = 200) -> None:
    body = {"serialized_named_tensors": [shared(list(part.items()))]}
    post(server, "/update_weights_from_tensor", body, status)


def send_to_vllm(server: Any, part: Part, status: int = 200) -> None:
    data = save(part)
    segment = SharedMemory(create=True, size=len(data))
    try:
        segment.buf[: len(data)] = data
        info = {"shared_memory": segment.name, "num_bytes": len(data)}
        post(server, "/update_weights", {"update_info": info}, status)
    finally:
        segment.close()
        segment.unlink()


def send_handles_to_vllm(server: Any, part: Part, status: int = 200) -> None:
    post(server, "/update_weights", {"update_info": {"ipc_handles_pickled": shared(list(part.items()))}}, status)


SEND: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("/continue_generation", "/end_weight_update"), send_to_sglang),
    "/finish_weight_update": send_to_vllm,
    **dict.fromkeys(("/areal_continue_generation", "/reset_prefix_cache/"), send_handles_to_vllm),
}
"""How tensors are sent by trainers that end an update with this call."""
MALFORMED = dict.fromkeys((send_to_vllm, send_handles_to_vllm), "/update_weights") | {
    send_to_sglang: "/update_weights_from_tensor"
}


@pytest.mark.parametrize("how", ["of another shape", "malformed"])
@pytest.mark.parametrize("end", list(SEND))
def test_what_is_left_of_an_update_does_not_serve_alone(
    server: Any, control: Control, policy: Any, end: str, how: str
) -> None:
    send, found, name = SEND[end], policy(1), control.weight_version
    names = list(found)
    server.run(control.snapshot_weights())
    send(server, {name: found[name] for name in names[:3]})
    if how == "malformed":
        post(server, MALFORMED[send], {"update_info": 5}, status=400)
    else:
        send(server, BAD, status=400)
    send(server, {name: found[name] for name in names[5:]})
    error = post(server, end, status=409)["error"]
    assert error["code"] == "update_failed" and "old weights" in error["message"]
    assert server.run(control.differing_weights()) == [] and control.weight_version == name
    assert control.updating is None
    if end not in ("/finish_weight_update",):
        post(server, end)  # with nothing under way, the trainer goes on
    # Whoever sends all of it again has an update, and so has who sends a part of which nothing is lost.
    send(server, {name: found[name] for name in names[:3]})
    send(server, {name: found[name] for name in names[3:]})
    assert control.updating is None and server.run(control.differing_weights())
    send(server, {NORM: policy(0)[NORM]})
    post(server, end)
    server.run(control.send(sources.from_bytes(save(policy(0))), finish="yes"))
    assert server.run(control.differing_weights()) == []


@pytest.mark.parametrize("other", ["in buckets", "from files"])
def test_two_trainers_at_once_make_no_mix(
    server: Any, control: Control, policy: Any, tiny_model: Path, other: str
) -> None:
    """They call their weights differently; the last of one comes after those of the other."""
    parts = [dict(list(policy(1).items())[at::2]) for at in range(2)]
    others = [dict(list(policy(2).items())[at::2]) for at in range(2)]
    server.run(control.snapshot_weights())

    def send(part: Part, version: str) -> None:
        body = {"serialized_named_tensors": [shared(list(part.items()))], "weight_version": version}
        post(server, "/update_weights_from_tensor", body)

    send(parts[0], "one")
    if other == "in buckets":
        send(others[0], "other")
    else:
        post(server, "/update_weights_from_disk", {"model_path": str(tiny_model)})
        server.run(control.snapshot_weights())
    send(parts[1], "one")
    assert post(server, "/continue_generation", status=409)["error"]["code"] == "update_failed"
    assert server.run(control.differing_weights()) == []
    for part in others:
        send(part, "other")
    assert control.weight_version == "other"
    server.run(control.update_from_disk(str(tiny_model)))


@pytest.mark.parametrize("end", ["/areal_continue_generation", "/continue_generation"])
def test_nothing_joins_or_ends_an_update_from_files(
    server: Any, control: Control, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(save(policy(1)))
    reading, go_on, operate = threading.Event(), threading.Event(), control.operate

    async def slowly(operation: Any) -> Any:
        if isinstance(operation, ReadTarget):
            reading.set()
            await asyncio.to_thread(go_on.wait, 300)
        return await operate(operation)

    monkeypatch.setattr(control, "operate", slowly)
    with ThreadPoolExecutor(1) as threads:
        body = {"model_path": str(tmp_path), "weight_version": "files"}
        update = threads.submit(post, server, "/update_weights_from_disk", body)
        assert reading.wait(300)
        bucket = {"serialized_named_tensors": [shared(list(policy(2).items())[:2])]}
        assert post(server, "/update_weights_from_tensor", bucket, status=409)["error"]["code"] == "conflict"
        post(server, end)
        go_on.set()
        assert update.result(300)["success"] is True
    assert control.weight_version == "files"
    found = server.run(control.checksums())
    server.run(control.send(sources.from_bytes(save(policy(1))), finish="yes"))
    assert server.run(control.checksums()) == found


def test_who_is_overtaken_is_told_so(server: Any, control: Control, policy: Any, monkeypatch: Any) -> None:
    """Another update begins while tensors of this one are on their way to the engine."""
    operate = control.operate

    async def overtaken(operation: Any) -> Any:
        if isinstance(operation, FillTargetShared):
            monkeypatch.setattr(control, "operate", operate)
            coming = asyncio.ensure_future(operate(operation))
            await asyncio.sleep(0)
            await control.begin_update()
            return await coming
        return await operate(operation)

    post(server, "/start_weight_update")
    monkeypatch.setattr(control, "operate", overtaken)
    send_to_vllm(server, policy(1), status=409)
    server.run(control.cancel_update())


def test_tensors_that_are_sent_again_are_not_lost(server: Any, control: Control, policy: Any) -> None:
    found = policy(1)
    post(server, "/start_weight_update")
    post(server, "/update_weights", {"update_info": 5}, status=400)
    send_to_vllm(server, found)
    post(server, "/finish_weight_update", {"weight_version": "again"})
    assert control.weight_version == "again"


def test_who_joins_a_group_has_nothing_to_do_with_what_another_trainer_has_left(
    server: Any, control: Control, policy: Any
) -> None:
    send_to_sglang(server, {NORM: policy(1)[NORM]})  # and then it is killed
    assert control.updating is not None
    group = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 0, "world_size": 2, "backend": "gloo"}
    post(server, "/init_weights_update_group", group, status=400)  # it has no rank 0
    assert control.updating is None


# Pauses --------------------------------------------------------------------------------------------------------------


def test_what_needs_the_engine_to_stand_still_ends_no_pause_of_others(server: Any, control: Control) -> None:
    async def pause_meanwhile() -> None:
        async with control.halted("wait"):
            assert control.paused
            await control.pause("keep")

    async def overlap() -> None:
        async with contextlib.AsyncExitStack() as second:
            async with control.halted("keep"):
                await second.enter_async_context(control.halted("recompute"))
            assert control.paused, "the other one lasts"

    async def resume_meanwhile() -> None:
        async with control.halted("keep"):
            await control.resume()
            assert control.paused

    server.run(pause_meanwhile())
    assert control.paused
    server.run(overlap())
    assert control.paused, "somebody has asked for it"
    server.run(resume_meanwhile())
    assert not control.paused
    server.run(overlap())
    assert not control.paused


def test_a_sleep_that_fails_pauses_nobody(server: Any, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    operate = control.operate

    async def fail(operation: Any) -> Any:
        if type(operation).__name__ == "ReleaseMemory":
            raise ConflictError("no")
        return await operate(operation)

    monkeypatch.setattr(control, "operate", fail)
    with pytest.raises(ConflictError):
        server.run(control.release_memory(mode="wait"))
    assert not control.paused and not control.refuses


def test_an_engine_that_takes_over_does_not_pause_for_what_has_ended(start_local: Callable[..., Any]) -> None:
    server = start_local()
    control = server.service.control

    async def die() -> None:
        async with control.halted("keep"):
            server.service.kill_engine()
            await server.service.engine.ended.wait()

    server.run(die())
    server.wait_until_ready()
    assert server.complete("Once", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert not control.paused
