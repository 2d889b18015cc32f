"""A rolling update as Kubernetes does it, of containers behind what stands in for a Service: no request is lost."""

from __future__ import annotations

import asyncio
import itertools
from urllib.parse import urlsplit

import pytest
from containers import HARDENED, Container, Containers, Stream
from rolling import Address, ServiceProxy, roll

pytestmark = pytest.mark.images
CLIENTS = 3
LITTLE = (*HARDENED, "--memory", "1200m", "--memory-swap", "1200m")
"""Too little for a KV cache of the usual size."""


def address(server: Container) -> Address:
    parts = urlsplit(server.url)
    assert parts.hostname is not None and parts.port is not None
    return Address(parts.hostname, parts.port)


async def test_no_request_is_lost_in_a_rolling_update(run: Containers) -> None:
    old = run(*LITTLE).wait_until_ready()
    proxy, over, numbers = ServiceProxy(), asyncio.Event(), itertools.count()
    answers: list[Stream] = []

    async def client() -> None:
        while not over.is_set():
            question = f"What is {next(numbers)} and a half?"
            answer = Stream(url, {"messages": [{"role": "user", "content": question}], "max_tokens": 40})
            answers.append(answer)
            await asyncio.to_thread(answer.join)

    async def terminate() -> None:
        await asyncio.to_thread(old.docker, "stop", "-t", "45", old.name)

    async with proxy.running():
        url = f"http://{proxy.address.host}:{proxy.address.port}"
        proxy.add(address(old))
        await proxy.until_ready(address(old), 30)
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client())
            await asyncio.sleep(2)
            new = await asyncio.to_thread(run, *LITTLE)
            await roll(proxy, address(old), address(new), terminate, start_timeout_s=300, pause_s=2)
            await asyncio.sleep(2)
            over.set()
    assert old.state["ExitCode"] == 0 and new.state["Status"] == "running"
    assert proxy.refused == 0 and len(answers) > 2 * CLIENTS
    assert [(answer.error, answer.is_whole) for answer in answers] == [(None, True)] * len(answers)
    assert new.metric("request_success_total") > 0
    assert all("1,200 MiB of memory" in server.log and not server.state["OOMKilled"] for server in (old, new))
    print(f"{len(answers)} requests, none lost")
