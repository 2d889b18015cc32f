"""Reads a server's /metrics: the load gauges that Slipstream and vLLM name alike up to the prefix."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import perf_counter

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

    @property
    def idle(self) -> bool:
        return self.running == 0 and self.waiting == 0 and self.kv_cache_usage == 0


def parse_load(text: str) -> Load | None:
    """None if the page has no such metrics. Values are summed over labels (several engines)."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            prefix, _, name = sample.name.partition(":")
            if prefix in ("slipstream", "vllm") and name in names:
                values[name] = values.get(name, 0.0) + sample.value
    if any(name not in values for name in names[:3]):
        return None
    return Load(*(values.get(name, 0.0) for name in names))


async def read_load(client: AsyncClient) -> Load | None:
    """None for a server without these metrics."""
    try:
        return parse_load(await client.metrics())
    except APIError as error:
        if error.status in (401, 403, 404, 405):
            return None
        raise


async def wait_idle(client: AsyncClient, timeout: float) -> Load | None:
    """Poll until the server is idle or ``timeout`` seconds are over; the last load seen."""
    start = perf_counter()
    while True:
        load = await read_load(client)
        if load is None or load.idle or perf_counter() - start > timeout:
            return load
        await asyncio.sleep(0.1)
