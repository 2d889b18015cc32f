"""Reads a server's /metrics: load, which Slipstream and vLLM name alike up to the prefix, and Slipstream's steps."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from slipstream.clients.aio import AsyncClient
from slipstream.clients.errors import APIError


@dataclass(frozen=True, slots=True)
class Load:
    running: float
    waiting: float
    kv_cache_usage: float
    """Share of the KV blocks in use by requests, 0 to 1; cached blocks that nobody uses do not count."""
    preemptions: float
    kv_cache_filled: float | None = None
    """Share of the KV blocks that hold something, be they in use or kept for reuse; None where nobody says so. A server
    on a CPU takes memory for a block when it is written first, so until this is 1 it grows."""

    @property
    def idle(self) -> bool:
        return self.running == 0 and self.waiting == 0 and self.kv_cache_usage == 0


@dataclass(frozen=True, slots=True)
class _Counters:
    """Values of numbers that only grow; the difference of two is what came in between."""

    def __sub__(self, earlier: Self) -> Self:
        values = {field.name: getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)}
        return replace(self, **values)


@dataclass(frozen=True, slots=True)
class Steps(_Counters):
    """What the engine did since it was started; the difference of two is what it did in between."""

    count: float
    model_seconds: float
    """Wall time in the model and in sampling."""
    overhead_cpu_seconds: float
    """CPU time of the engine on everything else."""


@dataclass(frozen=True, slots=True)
class Speculation(_Counters):
    """What became of draft tokens since the server was started; the difference of two is what did in between."""

    drafts: float
    draft_tokens: float
    accepted_tokens: float


@dataclass(frozen=True, slots=True)
class Tokens(_Counters):
    """Tokens that were sampled, and what speculation had to do with them."""

    generated: float
    drafts: float
    """Proposals that were verified, at least in part."""
    accepted: float

    @property
    def rows(self) -> float:
        """Rows of steps that sampled: each brings one token and what was accepted."""
        return self.generated - self.accepted

    @property
    def per_step(self) -> float | None:
        """Tokens per row; None if nothing was sampled."""
        return self.generated / self.rows if self.rows > 0 else None


def parse_load(text: str) -> Load | None:
    """None if the page has no such metrics. Values are summed over labels (several engines)."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")
    values = _read(text, ("slipstream", "vllm"), names)
    if any(name not in values for name in names[:3]):
        return None
    blocks = _read(text, ("slipstream",), ("kv_blocks_total", "kv_blocks_used", "kv_blocks_cached"))
    total = blocks.get("kv_blocks_total")
    filled = (blocks["kv_blocks_used"] + blocks["kv_blocks_cached"]) / total if total else None
    running, waiting, usage, preemptions = (values.get(name, 0.0) for name in names)
    return Load(running, waiting, usage, preemptions, filled)


def parse_steps(text: str) -> Steps | None:
    """None if the page has no such metrics."""
    names = ("engine_steps_total", "step_seconds_total", "scheduler_cpu_seconds_total")
    values = _read(text, ("slipstream",), names)
    return Steps(*(values[name] for name in names)) if len(values) == len(names) else None


def parse_speculation(text: str) -> Speculation | None:
    """None if the page has no such metrics. Values are summed over drafters."""
    counted = ("num_drafts_total", "num_draft_tokens_total", "num_accepted_tokens_total")
    names = tuple(f"spec_decode_{name}" for name in counted)
    values = _read(text, ("slipstream", "vllm"), names)
    return Speculation(*(values[name] for name in names)) if len(values) == len(names) else None


def parse_tokens(text: str) -> Tokens | None:
    """None if the page has no such metrics; a server without speculation has no proposals."""
    names = ("generation_tokens_total", "spec_decode_num_drafts_total", "spec_decode_num_accepted_tokens_total")
    values = _read(text, ("slipstream", "vllm"), names)
    return Tokens(*(values.get(name, 0.0) for name in names)) if names[0] in values else None


def _read(text: str, prefixes: tuple[str, ...], names: tuple[str, ...]) -> dict[str, float]:
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            prefix, _, name = sample.name.partition(":")
            if prefix in prefixes and name in names:
                values[name] = values.get(name, 0.0) + sample.value
    return values


async def read_load(client: AsyncClient) -> Load | None:
    """None for a server without these metrics."""
    return parse_load(await _page(client))


async def read_steps(client: AsyncClient) -> Steps | None:
    """None for a server without these metrics."""
    return parse_steps(await _page(client))


async def read_speculation(client: AsyncClient) -> Speculation | None:
    """None for a server without these metrics."""
    return parse_speculation(await _page(client))


async def read_tokens(client: AsyncClient) -> Tokens | None:
    """None for a server without these metrics."""
    return parse_tokens(await _page(client))


async def _page(client: AsyncClient) -> str:
    try:
        return await client.metrics()
    except APIError as error:
        if error.status in (401, 403, 404, 405, 501):
            return ""
        raise


async def wait_idle(client: AsyncClient, timeout: float) -> Load | None:
    """Poll until the server is idle or ``timeout`` seconds are over; the last load seen."""
    start = perf_counter()
    while True:
        load = await read_load(client)
        if load is None or load.idle or perf_counter() - start > timeout:
            return load
        await asyncio.sleep(0.1)
