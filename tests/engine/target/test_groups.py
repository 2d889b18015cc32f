"""Weights that a trainer broadcasts: its group is made with torch's own parts, as trainers make it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError, SupersededError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import (
    BeginTargetUpdate,
    CancelTargetUpdate,
    FinishTargetUpdate,
    JoinGroup,
    LeaveGroup,
    ReceiveTarget,
    TensorSpec,
)
from slipstream.engine.testing.local import LocalEngine, policy, write_policy
from tests.ports import free_port

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20))]
PATIENCE = timedelta(seconds=300)


class Named:
    """What trainers have copied from each other under names like init_custom_process_group."""

    def __init__(self, name: str, port: int) -> None:
        from torch.distributed import distributed_c10d as c10d

        store, rank, size = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=PATIENCE))
        store.set_timeout(PATIENCE)
        store = c10d.PrefixStore(name, store)
        backend = c10d.Backend("gloo")
        group, _ = c10d._new_process_group_helper(  # type: ignore[no-untyped-call]
            size, rank, [], backend, store, group_name=name, backend_options=None, timeout=PATIENCE
        )
        c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
        self.group: Any = group

    def broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self.group)

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def leave(self) -> None:
        dist.destroy_process_group(self.group)
        self.group = None


class Stateless:
    """What vLLM's stateless_init_torch_distributed_process_group makes of Gloo."""

    def __init__(self, _: str, port: int) -> None:
        address = f"tcp://127.0.0.1:{port}"
        store, rank, size = next(dist.rendezvous(address, 0, 2, timeout=PATIENCE))
        store.set_timeout(PATIENCE)
        self.group: Any = dist.ProcessGroupGloo(dist.PrefixStore(address, store), rank, size, timeout=PATIENCE)

    def broadcast(self, tensor: Tensor) -> None:
        self.group.broadcast(tensor, 0).wait()

    def barrier(self) -> None:
        self.group.barrier().wait()

    def leave(self) -> None:
        self.group = None


Group = Named | Stateless


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("policies")
    return [write_policy(root / str(seed), policy(seed)) for seed in range(2)]


def engine(folder: Path) -> LocalEngine:
    return LocalEngine(
        EngineConfig(
            model=str(folder), kv_cache_memory="4MiB", max_running=8, dtype="float32", pipeline="off", threads=1
        )
    )


@pytest.fixture(scope="module")
def fresh(folders: list[Path]) -> list[list[list[int]]]:
    answers = []
    for folder in folders:
        local = engine(folder)
        answers.append([done.tokens for done in local.generate(PROMPTS, GREEDY)])
        local.close()
    return answers


@pytest.fixture(scope="module")
def local(folders: list[Path]) -> Iterator[LocalEngine]:
    local = engine(folders[0])
    yield local
    local.close()


@pytest.fixture
def trainer() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, "trainer") as trainer:
        yield trainer


@contextlib.contextmanager
def joined(
    local: LocalEngine, trainer: ThreadPoolExecutor, kind: type[Group] = Named, name: str = "weights"
) -> Iterator[Group]:
    port = free_port()
    making = trainer.submit(kind, name, port)
    rendezvous: Any = "named" if kind is Named else "stateless"
    local.operate(JoinGroup(name, "127.0.0.1", port, 2, 1, "gloo", rendezvous, 300.0))
    group = making.result(300)
    try:
        yield group
    finally:
        local.operate(LeaveGroup(name))
        if group.group is not None:
            group.leave()


def specs(tensors: dict[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())


def each(group: Group, tensors: dict[str, Tensor], barrier: bool = False) -> None:
    for tensor in tensors.values():
        group.broadcast(tensor.contiguous())
        if barrier:
            group.barrier()


def packed(group: Group, tensors: dict[str, Tensor], buffer_bytes: int) -> None:
    """As vLLM packs them: bytes behind each other, until they are more than fit; and SGLang, all of them."""
    parts: list[Tensor] = []
    for tensor in tensors.values():
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
        if sum(map(len, parts)) > buffer_bytes:
            group.broadcast(torch.cat(parts))
            parts = []
    if parts:
        group.broadcast(torch.cat(parts))


WAYS: dict[str, tuple[type[Group], Callable[[Group, dict[str, Tensor]], None], dict[str, Any]]] = {
    "each": (Named, each, {}),
    "each, with barriers": (Stateless, lambda group, tensors: each(group, tensors, True), {"barrier": True}),
    "one bucket": (Named, lambda group, tensors: packed(group, tensors, 1 << 60), {"buffer_bytes": 1 << 60}),
    "packed": (Stateless, lambda group, tensors: packed(group, tensors, 9000), {"buffer_bytes": 9000}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_come_beside_the_steps(
    local: LocalEngine, trainer: ThreadPoolExecutor, fresh: list[list[list[int]]], way: Any, dtype: torch.dtype
) -> None:
    kind, send, options = way
    tensors = {name: tensor.to(dtype) for name, tensor in policy(1).items()}
    with joined(local, trainer, kind) as group:
        for version in (7, 8):  # the group serves for more than one update
            running = local.submit([5, 6], SamplingParams(max_tokens=200, temperature=0.0))
            local.operate(BeginTargetUpdate(version))
            sending = trainer.submit(send, group, tensors)
            missing = local.operate(ReceiveTarget(version, "weights", specs(tensors), **options))
            assert missing == 0
            sending.result(300)
            local.operate(FinishTargetUpdate(version))
            local.finish()
            assert running.finish_reason == "length" and len(running.tokens) == 200
            assert local.engine.scheduler.target_version == version
        if dtype == torch.float32:
            assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh[1]


def test_a_trainer_that_goes_half_way_leaves_the_old_weights(
    local: LocalEngine, trainer: ThreadPoolExecutor, folders: list[Path]
) -> None:
    before = [done.tokens for done in local.generate(PROMPTS, GREEDY)]
    version, tensors = local.stats.target_version, policy(0)

    def half(group: Group) -> None:
        for tensor in list(tensors.values())[:5]:
            group.broadcast(tensor)
        group.leave()

    with joined(local, trainer) as group:
        local.operate(BeginTargetUpdate(40))
        update = local.engine._target._update
        trainer.submit(half, group)
        with pytest.raises(ModelError, match="broke off"):
            local.operate(ReceiveTarget(40, "weights", specs(tensors)))
        assert update is not None and update._weights is None, "what has come is not kept"
        with pytest.raises(ModelError, match="cannot be finished: the trainer's broadcast"):
            local.operate(FinishTargetUpdate(40))
        local.operate(CancelTargetUpdate(40))
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == before
    assert local.engine.core.stats().target_version == version


def test_what_a_trainer_sends_of_an_update_that_was_given_up_does_not_disturb_the_next(
    local: LocalEngine, trainer: ThreadPoolExecutor, fresh: list[list[list[int]]]
) -> None:
    go_on, tensors = threading.Event(), policy(0)

    def send(group: Group) -> None:
        for at, tensor in enumerate(tensors.values()):
            group.broadcast(tensor)
            if at == 3:
                assert go_on.wait(300)

    with joined(local, trainer) as group:
        local.operate(BeginTargetUpdate(50))
        sending = trainer.submit(send, group)
        receiving = local.engine.operate(ReceiveTarget(50, "weights", specs(tensors)))
        local.operate(CancelTargetUpdate(50))
        with pytest.raises(SupersededError, match="cancelled"):
            local.wait(receiving)
        go_on.set()
        sending.result(300)
        local.operate(BeginTargetUpdate(51))
        trainer.submit(each, group, tensors)
        local.operate(ReceiveTarget(51, "weights", specs(tensors)), FinishTargetUpdate(51))
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh[0]


def test_nobody_at_the_address_is_told_in_time(local: LocalEngine) -> None:
    with pytest.raises(ModelError, match=r"group 'nobody' at 127.0.0.1:\d+ could not be joined"):
        local.operate(JoinGroup("nobody", "127.0.0.1", free_port(), 2, 1, "gloo", timeout_s=0.3))
    with pytest.raises(ModelError, match="no group 'nobody' of processes, but none: join it first"):
        local.operate(LeaveGroup("nobody"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "the trainer has rank 0"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"port": 0}, "no port 0"),
        ({"backend": "nccl"}, "use Gloo"),
    ],
)
def test_groups_that_cannot_be_are_refused_at_once(local: LocalEngine, fields: dict[str, Any], words: str) -> None:
    asked = {"name": "g", "address": "127.0.0.1", "port": 4000, "world_size": 2, "rank": 1, "backend": "gloo"} | fields
    with pytest.raises(ConfigError, match=words):
        local.operate(JoinGroup(**asked))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (TensorSpec("x", "float7", (1,)), "no number format 'float7'"),
        (TensorSpec("x", "nn", (1,)), "no number format"),
        (TensorSpec("x", "float32", (-1, 2)), "cannot have the shape"),
        (TensorSpec("x", "float32", (1 << 20, 1 << 20)), "cannot have the shape"),
    ],
)
def test_tensors_that_cannot_be_are_refused_before_anything_is_received(
    local: LocalEngine, trainer: ThreadPoolExecutor, spec: TensorSpec, words: str
) -> None:
    with joined(local, trainer):
        local.operate(BeginTargetUpdate(60))
        with pytest.raises(ConfigError, match=words):
            local.operate(ReceiveTarget(60, "weights", (spec,)))
