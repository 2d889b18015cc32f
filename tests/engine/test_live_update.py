"""Updates of the default model's weights under load, over the channel to an engine process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import psutil
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.client import EngineClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import NewRequest, SamplingParams, TokenDelta
from slipstream.engine.operations import (
    BeginTargetUpdate,
    CancelTargetUpdate,
    CheckIntegrity,
    FillTarget,
    FinishTargetUpdate,
    UpdateMode,
)
from slipstream.engine.testing.local import LocalEngine

pytestmark = pytest.mark.slow
STREAMS, BUCKET_BYTES = 32, 8 << 20
CONFIG = {"kv_cache_memory": "512MiB", "max_running": 8, "speculation": "off"}
"""Fewer rows than streams: some requests wait across every update."""


def policy(number: int) -> dict[str, Tensor]:
    """The default model after so many steps of a training that goes nowhere; 0: as it is."""
    generator = torch.Generator().manual_seed(number)
    found = {}
    for name, tensor in open_checkpoint("default").tensors():
        if number and tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor = tensor + 0.05 * tensor.float().std() * noise
        found[name] = tensor.to(torch.bfloat16)
    return found


def buckets(tensors: dict[str, Tensor]) -> Iterator[tuple[bytes, dict[str, int]]]:
    """All tensors in parts of at most so many bytes; some hold several tensors, some tensors are in several."""
    bucket: dict[str, Tensor] = {}
    firsts: dict[str, int] = {}
    size = 0
    for name, tensor in tensors.items():
        rows = max(BUCKET_BYTES // tensor[0].nbytes, 1)
        for first in range(0, len(tensor), rows):
            part = tensor[first : first + rows].clone()
            if bucket and (size + part.nbytes > BUCKET_BYTES or name in bucket):
                yield save(bucket), firsts
                bucket, firsts, size = {}, {}, 0
            bucket[name], firsts[name] = part, first
            size += part.nbytes
    yield save(bucket), firsts


class Stream:
    def __init__(self, client: EngineClient, prompt: list[int], max_tokens: int) -> None:
        self.prompt = prompt
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self._stream = client.submit(NewRequest(request_id=client.next_request_id(), prompt=prompt, params=params))
        self.deltas: list[TokenDelta] = []
        self.times: list[float] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for delta in self._stream:
            self.deltas.append(delta)
            self.times.append(time.monotonic())

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    def of_version(self, version: int) -> list[int]:
        return [token for delta in self.deltas if delta.target_version == version for token in delta.tokens]


async def send(
    client: EngineClient,
    version: int,
    weights: dict[str, Tensor],
    mode: UpdateMode,
    meanwhile: Callable[[], None] = lambda: None,
) -> float:
    """Seconds for which no step could run. ``meanwhile`` is called after each bucket."""
    await client.call(BeginTargetUpdate(version, mode))
    for tensors, first_rows in buckets(weights):
        await client.call(FillTarget(version, tensors, first_rows))
        meanwhile()
    report = await client.call(FinishTargetUpdate(version))
    print(f"{mode}: sent beside the steps in {report.prepare_seconds:.1f} s, steps stood still for", end=" ")
    print(f"{report.pause_seconds * 1e3:.1f} ms")
    return report.pause_seconds


def fresh_answers(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    engine = LocalEngine(EngineConfig(model=str(folder), dtype="bfloat16", **CONFIG))  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    found = [done.tokens for done in engine.generate(prompts, params)]
    engine.close()
    return found


@pytest.mark.parametrize("mode", get_args(UpdateMode))
def test_an_update_by_buckets_under_32_streams(
    tmp_path: Path, real_prompts: Callable[..., list[list[int]]], mode: UpdateMode
) -> None:
    prompts, later = real_prompts(STREAMS, 120), [[*prompt[:-1], 5] for prompt in real_prompts(4, 120)]
    weights = policy(1)
    (tmp_path / "config.json").write_text(json.dumps(open_checkpoint("default").config))
    save_file(weights, tmp_path / "model.safetensors")

    async def run() -> tuple[list[Stream], list[Stream]]:
        """Those that began before the update was through, and afterwards."""
        client = await EngineClient.start(EngineConfig(dtype="bfloat16", **CONFIG))  # type: ignore[arg-type]
        streams = [Stream(client, prompt, 160) for prompt in prompts]

        def ask_again() -> None:
            """As many as have ended, so that sending may take longer than all answers."""
            over = sum(stream.task.done() for stream in streams) + STREAMS - len(streams)
            streams.extend(Stream(client, prompt, 160) for prompt in prompts[:over])

        while sum(map(bool, (stream.deltas for stream in streams))) < 16:
            await asyncio.sleep(0.05)
        broken = dict(list(weights.items())[:-1])
        with pytest.raises(ModelError, match="lacks 1 tensors"):
            await send(client, 1, broken, mode, ask_again)
        await client.call(CancelTargetUpdate(1))
        assert not any(stream.of_version(1) for stream in streams) and client.failure is None
        await send(client, 1, weights, mode, ask_again)
        afterwards = [Stream(client, prompt, 24) for prompt in later]
        await asyncio.gather(*(stream.task for stream in streams + afterwards))
        await client.call(CheckIntegrity())
        assert client.stats.blocks_used == 0
        await client.close()
        return streams, afterwards

    streams, afterwards = asyncio.run(run())
    waited = [stream for stream in streams if not stream.of_version(0)]
    running = [stream for stream in streams if stream.of_version(0)]
    mixed = [stream for stream in running if stream.of_version(1)]
    if mode == "abort":
        assert {stream.deltas[-1].finish_reason for stream in streams} <= {"abort", "length"}
        assert any(stream.deltas[-1].finish_reason == "abort" for stream in running)
        assert not any(stream.of_version(1) for stream in streams)
        waited = []
    else:
        assert all(stream.deltas[-1].finish_reason == "length" for stream in streams + afterwards)
        assert mixed and waited
    asked = waited + afterwards
    for stream, tokens in zip(asked, fresh_answers(tmp_path, [s.prompt for s in asked], 160), strict=True):
        assert stream.of_version(1) == stream.tokens == tokens[: len(stream.tokens)]
    if mode == "recompute":
        found = fresh_answers(tmp_path, [[*s.prompt, *s.of_version(0)] for s in mixed], 160)
        for stream, tokens in zip(mixed, found, strict=True):
            assert stream.of_version(1) == tokens[: len(stream.of_version(1))]
    gaps = [later - before for s in streams + afterwards for before, later in zip(s.times, s.times[1:], strict=False)]
    print(
        f"{len(running)} ran, {len(waited)} waited; gaps: median {sorted(gaps)[len(gaps) // 2]:.3f} s, {max(gaps):.3f}"
    )


def test_fifty_updates_do_not_leak(real_prompts: Callable[..., list[list[int]]]) -> None:
    prompts, weights = real_prompts(8, 120), [policy(number) for number in (0, 1)]

    async def run() -> list[int]:
        client = await EngineClient.start(EngineConfig(dtype="bfloat16", **CONFIG))  # type: ignore[arg-type]
        process, memory = psutil.Process(client.pid), []
        for number in range(1, 51):
            streams = [Stream(client, prompt, 8) for prompt in prompts]
            await send(client, number, weights[number % 2], get_args(UpdateMode)[number % 3])
            await asyncio.gather(*(stream.task for stream in streams))
            memory.append(process.memory_info().rss)
        await client.call(CheckIntegrity())
        assert client.stats.blocks_used == 0 and client.stats.target_version == 50
        await client.close()
        return memory

    memory = asyncio.run(run())
    print("MiB after each update:", [size >> 20 for size in memory])
    assert max(memory[-10:]) < max(memory[5:15]) + (40 << 20)
