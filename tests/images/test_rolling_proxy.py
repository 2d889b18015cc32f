"""The proxy that stands for a Service: what it forwards, and that a careless update through it loses requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rolling import Address, ServiceProxy, roll

pytestmark = pytest.mark.images

PIECES = 6
PIECE_S = 0.05
"""An answer takes PIECES * PIECE_S."""


class Server(ThreadingHTTPServer):
    """Streams answers; once it drains, it finishes those under way and answers others with 503."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.draining = False
        self.answered = 0
        self.address = Address("127.0.0.1", self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.server.draining:
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        pieces = 1 if self.path == "/ready" else PIECES
        self.send_response(200)
        self.send_header("content-length", str(pieces))
        self.end_headers()
        for _ in range(pieces):
            self.wfile.write(b".")
            if self.path != "/ready":
                time.sleep(PIECE_S)
        if self.path != "/ready":
            self.server.answered += 1

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(address: Address) -> str:
    """What became of one request over a connection of its own."""
    connection = HTTPConnection(address.host, address.port, timeout=10)
    try:
        connection.request("GET", "/stream")
        answer = connection.getresponse()
        return "whole" if answer.status == 200 and len(answer.read()) == PIECES else str(answer.status)
    except (OSError, HTTPException):
        return "cut"
    finally:
        connection.close()


async def update(pause_s: float, propagation_s: float, poll_s: float) -> tuple[Counter[str], Server, Server]:
    """What became of requests of eight clients, who do not stop asking, during an update."""
    outcomes: Counter[str] = Counter()
    proxy = ServiceProxy(poll_s=poll_s)
    with serving() as old, serving() as new:
        async with proxy.running():
            address = proxy.address
            proxy.add(old.address)
            await proxy.until_ready(old.address, 10)
            stop = False

            async def client() -> None:
                while not stop:
                    outcomes[await asyncio.to_thread(ask, address)] += 1

            clients = [asyncio.create_task(client()) for _ in range(8)]

            async def terminate() -> None:
                old.draining = True

            await asyncio.sleep(0.3)
            times = {"start_timeout_s": 10.0, "pause_s": pause_s, "propagation_s": propagation_s}
            await roll(proxy, old.address, new.address, terminate, **times)
            await asyncio.sleep(0.5)
            assert proxy.ready == {new.address}
            stop = True
            await asyncio.gather(*clients)
    return outcomes, old, new


async def test_an_update_loses_nothing_if_the_old_server_waits_for_the_news() -> None:
    outcomes, old, new = await update(pause_s=1.0, propagation_s=0.3, poll_s=0.1)
    assert set(outcomes) == {"whole"}
    assert old.answered and new.answered, "both took part"


async def test_an_update_without_a_pause_loses_requests() -> None:
    # Otherwise the test above, and the one with containers, would prove nothing. Nobody looks whether the old server is
    # ready before the news has come: the update, and not the clock, decides.
    outcomes, _, _ = await update(pause_s=0.0, propagation_s=1.0, poll_s=60)
    assert outcomes["503"] > 0


async def test_connections_stay_with_a_backend_that_has_left() -> None:
    with serving() as server:
        proxy = ServiceProxy(poll_s=0.1)
        async with proxy.running():
            proxy.add(server.address)
            await proxy.until_ready(server.address, 10)
            answer = asyncio.create_task(asyncio.to_thread(ask, proxy.address))
            await asyncio.sleep(PIECE_S * 2)
            proxy.remove(server.address)
            assert await answer == "whole"
            assert await asyncio.to_thread(ask, proxy.address) == "cut"
            assert proxy.refused == 1


async def test_who_is_not_ready_gets_nothing() -> None:
    with serving() as server:
        server.draining = True
        proxy = ServiceProxy(poll_s=0.05)
        async with proxy.running():
            proxy.add(server.address)
            with pytest.raises(TimeoutError):
                await proxy.until_ready(server.address, 0.3)
            server.draining = False
            await proxy.until_ready(server.address, 10)
            server.draining = True
            async with asyncio.timeout(10):
                while proxy.ready:
                    await asyncio.sleep(0.02)
