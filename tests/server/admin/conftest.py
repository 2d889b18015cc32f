"""A server that learns, with heads to import; and a headless Chromium, spoken to through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slipstream.drafter.head import layout
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.models.config import decoder_config

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

KEY = "an-admin-key"


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Heads of the tiny model, one with too few tokens for this server, and one of another model."""
    folder = tmp_path_factory.mktemp("heads")
    target = decoder_config(open_checkpoint(tiny_model).config)
    config = layout.config_for(target, 8192)
    layout.write(folder / "fits", config, layout.random_tensors(config, 0))
    small = layout.config_for(target, 512)
    layout.write(folder / "small", small, layout.random_tensors(small, 0))
    wrong = replace(config, vocab_size=2 * config.vocab_size, hidden=2 * config.hidden)
    layout.write(folder / "wrong", wrong, layout.random_tensors(wrong, 0))
    return folder


@pytest.fixture(scope="session")
def evolving(start_local: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a registry, a lineage, a worker that has too little to learn from, and keys."""
    folder = tmp_path_factory.mktemp("evolving")
    server = start_local(
        **{"registry": str(folder / "registry"), "evolve": "idle", "evolve_first_tokens": 10**9},
        target_lineage="run 7",
        **{"traffic_log": "tokens", "traffic_folder": str(folder / "traffic")},
        **{"api_key": ("a-user-key",), "admin_key": (KEY,)},
    )
    server.headers = {"authorization": "Bearer a-user-key"}
    return server


class Page:
    """One tab. What its console says, and requests it makes, are kept."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._session = ""
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.create_task(self._read())
        self.errors: list[str] = []
        self.requested: list[str] = []

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._replies.pop(event["id"]).set_result(event)
                continue
            details = event["params"]
            match event["method"]:
                case "Runtime.exceptionThrown":
                    self.errors.append(json.dumps(details["exceptionDetails"]))
                case "Log.entryAdded" if details["entry"]["level"] == "error":
                    self.errors.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
                case "Network.requestWillBeSent":
                    self.requested.append(details["request"]["url"])

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._replies[number] = future = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        reply = await asyncio.wait_for(future, 300)
        assert "error" not in reply, reply
        return reply["result"]

    async def begin(self) -> Page:
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        self._session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        return self

    async def open(self, url: str, width: int = 1280, scheme: str = "light") -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        reply = await self.call("Page.navigate", url=url)
        assert "errorText" not in reply, reply

    async def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        reply = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def wait(self, expression: str, seconds: float = 300.0) -> Any:
        """Until it is true, or an element."""
        expression = f"(value => value instanceof Node || value)({expression})"
        deadline = time.monotonic() + seconds
        while not (value := await self.ask(expression)):
            assert time.monotonic() < deadline, (expression, self.errors, await self.text("body"))
            await asyncio.sleep(0.1)
        return value

    async def text(self, selector: str) -> str:
        found: str = await self.ask(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    async def hover(self, selector: str, share: float) -> None:
        """Moves the pointer over an element, so far from its left edge as a share of its width."""
        await self.ask(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = await self.ask(
            "(b => [b.x, b.y, b.width, b.height])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        x, y = box[0] + share * box[2], box[1] + box[3] / 2
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def picture(self, path: Path) -> None:
        """Takes a picture of the whole page."""
        reply = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(reply["data"]))


@pytest.fixture
async def open_page(tmp_path: Path) -> AsyncIterator[Callable[[], Any]]:
    """Opens tabs without a history."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    process = await asyncio.create_subprocess_exec(
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'browser'}"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(300):
            while b"DevTools listening on" not in (line := await process.stderr.readline()):
                assert line, "Chromium ended"
        draining = asyncio.create_task(process.stderr.read())
        async with aiohttp.ClientSession() as session:
            address = line.split()[-1].decode()

            async def new() -> Page:
                return await Page(await session.ws_connect(address, max_msg_size=0)).begin()

            yield new
    finally:
        process.terminate()
        await process.wait()
    await draining
