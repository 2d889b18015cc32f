"""The load test of tenants, against a server whose faults a test decides."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from slipstream.clients.errors import ClientError
from slipstream.loadtest.harness import connect
from slipstream.loadtest.tenants import TenantsOptions, print_tenants, tenants

FAST = TenantsOptions(
    **{"seconds": 1.0, "alone_seconds": 0.5, "peak_seconds": 0.5, "concurrency": 4, "quiet_share": 0.2},
    **{"max_output_tokens": 8, "settle": 300.0, "slow_share": 0.05, "least_goodput": 0.0, "most_delay": 1e6},
    most_goodput=1e6,
)


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And slow readers whose last ones do not keep a phase from ending for seconds."""
    monkeypatch.setattr("slipstream.loadtest.tenants.PEAK_REQUESTS", 128)
    monkeypatch.setattr("slipstream.loadtest.tenants.SLOW_S", 0.02)


async def run(server: Any, options: TenantsOptions = FAST) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        targets = [await stack.enter_async_context(connect(server.url)) for _ in range(3)]
        return await tenants(targets[0], targets[1:], options)


async def test_a_server_without_bounds_harms_nobody(serve: Any) -> None:
    async with serve(ttft=0.01, pace=0.001) as server:
        found = await run(server)
    assert found["problems"] == []
    assert found["flood"]["sent"] > found["quiet"][0]["sent"] > 0
    assert found["flood"]["cut"] + found["flood"]["whole"] == found["flood"]["sent"]
    console = Console(record=True, width=140)
    print_tenants(found, console)
    assert "quiet 2, alone" in console.export_text()


@pytest.mark.parametrize("header", [{}, {"Retry-After": "1"}])
async def test_refusals_have_to_say_when_to_come_back(serve: Any, header: dict[str, str]) -> None:
    async with serve(pace=0.001) as server:
        count = 0

        def refuse() -> None:
            nonlocal count
            count += 1
            if count > 8 and count % 3 == 0:
                raise web.HTTPTooManyRequests(headers=header)

        server.on_request = refuse
        found = await run(server)
    said = [problem for problem in found["problems"] if "come back" in problem]
    assert bool(said) == (not header)
    assert found["flood"]["refused"] > 0


async def test_what_did_not_hold_is_told(serve: Any) -> None:
    strict = {"least_goodput": 10.0, "most_delay": 1e-6, "seconds": 1.0, "alone_seconds": 0.5, "peak_seconds": 0.5}
    options = TenantsOptions(**strict, concurrency=4, quiet_share=0.2, max_output_tokens=8, settle=0.3, slow_share=0)
    async with serve(pace=0.001) as server:
        found = await run(server, options)
        assert any("goodput" in problem for problem in found["problems"])
        assert any("first token" in problem for problem in found["problems"])
        found = await run(server, replace(options, least_goodput=0.0, most_goodput=0.01))
        assert any("no overload" in problem for problem in found["problems"])
        server.leak = 1
        with pytest.raises(ClientError, match="busy"):
            await run(server, options)
    with pytest.raises(ValueError, match="more than there is"):
        TenantsOptions(quiet_share=0.9)
