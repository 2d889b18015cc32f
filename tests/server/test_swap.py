"""A learned drafter is swapped in a real engine process, under load: seen in answers and metrics, never in tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from slipstream.drafter.head import layout
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.client import EngineClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError, SlipstreamError
from slipstream.engine.messages import NewRequest, SamplingParams, TokenDelta
from slipstream.engine.models.config import decoder_config
from slipstream.engine.operations import CheckIntegrity, DropDrafter, SwapDrafter
from slipstream.engine.testing.local import TINY_LLAMA, policy, write_policy
from slipstream.server.app import build_app
from slipstream.server.config import ServerConfig
from slipstream.server.service import Service
from slipstream.server.testing import start_in_thread

TINY = TINY_LLAMA | {"max_position_embeddings": 512, "tie_word_embeddings": True}
STREAMS = 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("tiny"), policy(0, TINY, 8), TINY)


def write_heads(model: str | Path, folder: Path, draft_vocab_size: int) -> list[Path]:
    """A cold head of this model and a random one."""
    checkpoint = open_checkpoint(model)
    target = decoder_config(checkpoint.config)
    config = layout.config_for(target, draft_vocab_size)
    last = layout.last_layer(checkpoint.tensors(), target.shape.num_layers)
    layout.write(folder / "cold", config, layout.from_target(config, last, range(config.draft_vocab_size)))
    layout.write(folder / "random", config, layout.random_tensors(config, 0))
    return [folder / "cold", folder / "random"]


async def serve_while_swapping(
    config: EngineConfig, prompts: list[list[int]], max_tokens: int, files: list[Path], swaps: int
) -> tuple[list[list[int]], list[list[TokenDelta]]]:
    """32 streams, one after the other each, until so many swaps have landed; and the same prompts without drafts."""
    engine = await EngineClient.start(config, "slipstream.server.engine_process", ("warning", "text", "{}"))
    told: list[list[TokenDelta]] = []
    swapping = True

    async def ask(prompt: list[int], mode: str) -> list[TokenDelta]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = NewRequest(request_id=engine.next_request_id(), prompt=prompt, params=params)
        return [delta async for delta in engine.submit(request)]

    async def stream() -> None:
        while swapping:
            told.append([])
            mine = told[-1]
            mine += await ask(prompts[(len(told) - 1) % len(prompts)], "auto")

    order: list[int] = []
    pauses: list[float] = []
    preparing: list[float] = []
    engine.on_step.append(lambda step: order.extend(d.drafter_version for d in step.deltas if d.num_drafted))
    try:
        streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
        for version in range(2, swaps + 2):
            reply = await engine.call(SwapDrafter(version, "", str(files[version % len(files)])))
            assert reply.version == version
            pauses.append(reply.pause_seconds)
            preparing.append(reply.prepare_seconds)
            async with asyncio.timeout(300):  # a swap takes less than a step of many streams
                while not order or order[-1] < version:
                    await asyncio.sleep(0.01)
            with pytest.raises(SlipstreamError, match="is no drafter"):
                await engine.call(SwapDrafter(version, "", str(files[0].parent / "nothing")))
        swapping = False
        await asyncio.gather(*streams)
        await engine.call(CheckIntegrity())
        [head] = [entry for entry in engine.stats.drafters if entry.name == "head"]
        assert head.routes == {"": swaps + 1} and head.swaps == swaps
    finally:
        await engine.close()
    # Whatever else runs on the machine may come between a swap's beginning and its end, but not in each of them.
    assert min(pauses) < min(preparing)
    assert order == sorted(order) and set(order) >= set(range(2, swaps + 2)), "drafts of each were verified"
    assert all(deltas[-1].finish_reason == "length" for deltas in told)
    answers = [[token for delta in deltas for token in delta.tokens] for deltas in told]
    return answers, told


async def plain_answers(config: EngineConfig, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    engine = await EngineClient.start(config, "slipstream.server.engine_process", ("warning", "text", "{}"))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)

    async def ask(prompt: list[int]) -> list[int]:
        request = NewRequest(request_id=engine.next_request_id(), prompt=prompt, params=params)
        return [token async for delta in engine.submit(request) for token in delta.tokens]

    try:
        return list(await asyncio.gather(*map(ask, prompts)))
    finally:
        await engine.close()


def check_swaps(
    folder: Path, prompts: list[list[int]], max_tokens: int, swaps: int, draft_vocab_size: int, **fields: Any
) -> None:
    options: dict[str, Any] = {"speculation_policy": "fixed", "max_draft_tokens": 3, **fields}
    files = write_heads(options.get("model", "default"), folder, draft_vocab_size)
    config = EngineConfig(drafter=str(files[0]), speculation="head", **options)
    answers, _ = asyncio.run(serve_while_swapping(config, prompts, max_tokens, files, swaps))
    expected = asyncio.run(plain_answers(EngineConfig(speculation="off", **options), prompts, max_tokens))
    assert len(answers) >= STREAMS
    for at, answer in enumerate(answers):
        assert answer == expected[at % len(prompts)]


def test_swaps_in_an_engine_process(tiny: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 96, rng.integers(3, 40)).tolist() for _ in range(64)]
    check_swaps(tmp_path, prompts, 80, 10, 96, model=str(tiny), dtype="float32", kv_cache_memory="32MiB")


@pytest.mark.slow
def test_fifty_swaps_under_the_default_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40_000, rng.integers(10, 100)).tolist() for _ in range(64)]
    check_swaps(tmp_path, prompts, 64, 50, 8192, deterministic=True, kv_cache_memory="512MiB")


@asynccontextmanager
async def running(**fields: Any) -> AsyncIterator[tuple[Service, httpx2.AsyncClient]]:
    config = EngineConfig(kv_cache_memory="128MiB", **fields)
    service = Service(ServerConfig(), config, TrafficConfig(), start_in_thread)
    await service.load()
    transport = httpx2.ASGITransport(app=build_app(service))
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as http:
            yield service, http
    finally:
        await service.close()


async def complete(http: httpx2.AsyncClient, **fields: Any) -> Any:
    body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    reply = await http.post("/v1/completions", json=body | {"return_metrics": True, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_routes_over_http(tiny_model: Path, tmp_path: Path) -> None:
    cold, random = write_heads(tiny_model, tmp_path, 8192)

    async def play() -> None:
        options: dict[str, Any] = {"model": str(tiny_model), "drafter": "cold"}
        options |= {"speculation": "head", "speculation_policy": "fixed", "max_draft_tokens": 3}
        async with running(**options) as (service, http):
            first = await complete(http)
            assert first["metrics"]["speculative_decoding"]["drafter_versions"] == [1]
            await service.engine.call(SwapDrafter(4, "tenant:acme", str(cold)))
            await service.engine.call(SwapDrafter(5, "canary", str(random)))
            reply = await complete(http, user="acme")
            assert reply["metrics"]["speculative_decoding"]["drafter_versions"] == [4]
            assert reply["choices"] == first["choices"]
            lines = (await http.get("/metrics")).text.splitlines()
            gauges = [line for line in lines if line.startswith("slipstream:drafter_version{")]
            found = {line.split('route="')[1].split('"')[0]: float(line.split()[-1]) for line in gauges}
            assert found == {"": 1.0, "tenant:acme": 4.0, "canary": 5.0}
            drafted = [line for line in lines if line.startswith("slipstream:drafter_version_num_draft_tokens_total{")]
            assert len(drafted) == 3 and any(float(line.split()[-1]) > 0 for line in drafted)
            await service.engine.call(SwapDrafter(6, "domain:full", str(cold)))
            with pytest.raises(SlipstreamError, match="--max-drafters") as caught:
                await service.engine.call(SwapDrafter(7, "domain:none", str(cold)))
            assert not isinstance(caught.value, ModelError), "which would be a verdict on the version"
            for route in ("canary", "domain:full"):
                await service.engine.call(DropDrafter(route))
            assert service.drafter_versions() == {"": 1, "tenant:acme": 4}
            assert service.route(1, "acme", "", "") == "tenant:acme" and service.route(1, "other", "", "") == ""
            assert service.route(1, "acme", "", "sql") == "lora:sql"

    asyncio.run(play())
