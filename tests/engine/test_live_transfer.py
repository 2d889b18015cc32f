"""Sleep, and trainers that are killed, with a real engine process: what it takes of the machine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import psutil
import pytest

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.client import EngineClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import NewRequest, SamplingParams, TokenDelta
from slipstream.engine.operations import (
    BeginTargetUpdate,
    CancelTargetUpdate,
    CheckIntegrity,
    ChecksumTarget,
    JoinGroup,
    MemoryTag,
    ReceiveTarget,
    ReleaseMemory,
    ResumeMemory,
    TensorSpec,
)
from tests.ports import free_port

pytestmark = pytest.mark.slow
LEVELS: list[tuple[tuple[MemoryTag, ...], bool]] = [
    (("kv_cache",), True),
    (("kv_cache", "weights"), True),
    (("kv_cache", "weights"), False),
]
ARENAS = 128 << 20
"""What glibc's allocator reserves for threads that begin meanwhile: 64 MiB each."""
TRAINER = """
import json, sys, torch, torch.distributed as dist
from datetime import timedelta
from torch.distributed import distributed_c10d as c10d
port, shapes = int(sys.argv[1]), json.loads(sys.argv[2])
limit = timedelta(seconds=1000)
store, rank, size = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=limit))
group, _ = c10d._new_process_group_helper(
    size, rank, [], c10d.Backend("gloo"), c10d.PrefixStore("weights", store), group_name="weights", timeout=limit
)
c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
for at, shape in enumerate(shapes):
    if at == len(shapes) // 2:
        print("half", flush=True)
        sys.stdin.read()
    dist.broadcast(torch.zeros(shape, dtype=torch.bfloat16), src=0, group=group)
"""


async def start(**fields: Any) -> EngineClient:
    traffic = msgspec.json.encode(dataclasses.asdict(TrafficConfig())).decode()
    config = EngineConfig(dtype="bfloat16", kv_cache_memory="512MiB", max_running=8, **fields)
    return await EngineClient.start(config, "slipstream.server.engine_process", ("error", "text", traffic))


async def say(client: EngineClient, prompts: list[list[int]]) -> tuple[list[list[int]], int, set[int]]:
    """Answers, accepted draft tokens, and the versions of drafters."""

    async def one(prompt: list[int]) -> list[TokenDelta]:
        params = SamplingParams(max_tokens=40, temperature=0.0)
        stream = client.submit(NewRequest(request_id=client.next_request_id(), prompt=prompt, params=params))
        return [delta async for delta in stream]

    found = [await one(prompt) for prompt in prompts]
    deltas = [delta for each in found for delta in each]
    tokens = [[token for delta in each for token in delta.tokens] for each in found]
    return tokens, sum(delta.num_accepted for delta in deltas), {delta.drafter_version for delta in deltas} - {0}


def test_memory_returns_to_the_system(real_prompts: Callable[..., list[list[int]]]) -> None:
    prompts = real_prompts(4, 120)

    async def run() -> None:
        client = await start(drafter="warm", speculation="head", speculation_policy="fixed", max_draft_tokens=3)
        process, ready = psutil.Process(client.pid), client.ready
        before = await say(client, prompts)
        assert before[1] > 0 and before[2]
        awake = process.memory_info()
        for number in range(3):
            for tags, keep in LEVELS:
                reserved = process.memory_info().vms
                await client.call(ReleaseMemory(tags, keep))
                asleep = process.memory_info()
                await client.call(ResumeMemory(tags))
                assert await say(client, prompts) == before
                again = process.memory_info()
                what = f"round {number}, {' and '.join(tags)}{'' if keep else ', discarded'}"
                sizes = [f"{size.rss >> 20} of {size.vms >> 20}" for size in (awake, asleep, again)]
                print(f"{what}: MiB resident awake {sizes[0]}, asleep {sizes[1]}, again {sizes[2]}")
                # Of the cache only what has been written is resident: that all is gone shows in what is reserved.
                assert asleep.vms <= reserved - ready.kv_cache_bytes + ARENAS
                assert asleep.rss <= 1.05 * (awake.rss - (0 if keep else ready.weights_bytes))
                assert asleep.rss < awake.rss and abs(again.rss - awake.rss) <= 0.05 * awake.rss
        await client.call(CheckIntegrity())
        await client.close()

    asyncio.run(run())


def test_trainers_that_are_killed_half_way(real_prompts: Callable[..., list[list[int]]]) -> None:
    prompts = real_prompts(2, 120)
    shapes = {name: tuple(tensor.shape) for name, tensor in open_checkpoint("default").tensors()}
    specs = tuple(TensorSpec(name, "bfloat16", shape) for name, shape in shapes.items())

    async def run() -> list[int]:
        client, memory = await start(speculation="off"), []
        process = psutil.Process(client.pid)
        before, checksums = await say(client, prompts), await client.call(ChecksumTarget())
        for version in range(1, 4):
            port = free_port()
            trainer = subprocess.Popen(
                [sys.executable, "-P", "-c", TRAINER, str(port), json.dumps(list(shapes.values()))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert trainer.stdout is not None
            await client.call(JoinGroup("weights", "127.0.0.1", port, 2, 1, "gloo"))
            await client.call(BeginTargetUpdate(version))
            receiving = asyncio.create_task(client.call(ReceiveTarget(version, "weights", specs)))
            assert await asyncio.to_thread(trainer.stdout.readline) == b"half\n"
            assert (await say(client, prompts))[0] == before[0], "steps go on while it waits"
            trainer.send_signal(signal.SIGKILL)
            with pytest.raises(ModelError, match="broke off"):
                await receiving
            trainer.communicate()
            await client.call(CancelTargetUpdate(version))
            for operation in (ReleaseMemory(("kv_cache",)), ResumeMemory(("kv_cache",))):
                await client.call(operation)  # gives back what the allocator keeps for later
            assert (await say(client, prompts))[0] == before[0]
            memory.append(process.memory_info().rss)
        assert await client.call(ChecksumTarget()) == checksums and client.stats.target_version == 0
        await client.close()
        return memory

    memory = asyncio.run(run())
    print("MiB after each killed trainer:", [size >> 20 for size in memory])
    # What is free at the end of a thread's arena, up to 64 MiB, is not given back by malloc_trim; what two more
    # trainers have sent would be all of the weights, 97 MB of blocks at least.
    assert memory[-1] < memory[0] + (80 << 20)
