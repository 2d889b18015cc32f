"""Servers that end under load: what they have taken they finish, and behind a proxy nobody notices."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import uvicorn
from rolling import Address, ServiceProxy, roll

from slipstream.server import launch
from slipstream.server.http.protocol import HttpProtocol

CLIENTS = 6
TOKENS = 30
ROUNDS = 20


@dataclass
class Load:
    """Clients that ask one question after the other, half of them for streams, and note what becomes of each."""

    url: str
    new_connections: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        numbers = itertools.count()
        connector = aiohttp.TCPConnector(force_close=self.new_connections)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(session, numbers))

    async def _client(self, session: aiohttp.ClientSession, numbers: itertools.count[int]) -> None:
        while not self.over.is_set():
            number = next(numbers)
            body = {"prompt": f"Question {number}", "max_tokens": TOKENS, "ignore_eos": True, "stream": number % 2 == 0}
            outcome = await self._ask(session, body)
            self.outcomes[outcome] += 1
            if outcome != "whole":
                await asyncio.sleep(0.05)

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        """whole, refused (before anything was done for it), or lost."""
        answered = False
        try:
            async with session.post(f"{self.url}/v1/completions", json=body) as response:
                answered = True
                text = (await response.read()).decode()
        except aiohttp.ClientError as error:
            if not answered:
                return "refused"  # no byte of an answer: the server had closed its end
            self.lost.append(repr(error))
            return "lost"
        if response.status == 503 and "is shutting down" in text:
            return "refused"
        # A token of its own may be the word error, so only an event that is one counts.
        whole = text.endswith("data: [DONE]\n\n") and 'data: {"error"' not in text if body["stream"] else TOKENS
        if response.status != 200 or not whole or (whole is TOKENS and f'"completion_tokens":{TOKENS}' not in text):
            self.lost.append(f"{response.status} {text[-300:]}")
            return "lost"
        return "whole"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
async def test_no_request_that_was_taken_is_lost_in_a_drain(start_tiny: Callable[..., Any], number: int) -> None:
    server = await asyncio.to_thread(lambda: start_tiny("--drain-timeout-s", "120").wait_until_ready())
    load = Load(server.url)
    running = asyncio.create_task(load.run())
    await asyncio.sleep(1 + number % 5 * 0.23)
    server.process.send_signal(signal.SIGTERM)
    status = await asyncio.to_thread(server.process.wait, 300)
    load.over.set()
    await running
    assert status == 0 and load.lost == []
    assert load.outcomes["whole"] >= CLIENTS


@pytest.mark.slow
async def test_a_rolling_restart_of_two_servers_behind_a_proxy_loses_none(start_tiny: Callable[..., Any]) -> None:
    def start() -> Any:
        return start_tiny("--drain-timeout-s", "120")

    def address(server: Any) -> Address:
        return Address("127.0.0.1", server.port)

    servers = [start(), start()]
    proxy = ServiceProxy()
    async with proxy.running():
        for server in servers:
            proxy.add(address(server))
            await proxy.until_ready(address(server), 300)
        load = Load(f"http://127.0.0.1:{proxy.address.port}", new_connections=True)
        running = asyncio.create_task(load.run())
        await asyncio.sleep(1)
        fresh = []
        for old in servers:
            fresh.append(start())

            async def terminate(old: Any = old) -> None:
                old.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(old.process.wait, 300) == 0

            await roll(proxy, address(old), address(fresh[-1]), terminate, start_timeout_s=300, pause_s=1)
        await asyncio.sleep(1)
        load.over.set()
        await running
    assert load.lost == [] and proxy.refused == 0
    assert set(load.outcomes) == {"whole"} and load.outcomes["whole"] > 4 * CLIENTS
    assert all(server.metric("request_success_total") > 0 for server in fresh)


async def test_who_does_not_read_the_end_is_cut_off_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "FLUSH_TIMEOUT_S", 0.2)

    async def answer(_: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})

    config = uvicorn.Config(answer, http=HttpProtocol, lifespan="off", log_config=None, timeout_graceful_shutdown=300)
    http = launch.HttpServer(config)
    with launch.listen("127.0.0.1", 0) as listener:
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readexactly(1)
        [connection] = http.server_state.connections
        assert isinstance(connection, HttpProtocol)
        while not connection.flow.write_paused:
            await asyncio.sleep(0)
        await http.end(serving)
        writer.close()
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
