"""A headless Chromium, spoken to through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


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
                case "Log.entryAdded":
                    self.errors.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
                case "Network.requestWillBeSent":
                    self.requested.append(details["request"]["url"])

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._replies[number] = future = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        reply = await asyncio.wait_for(future, 30)
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
        await self.call("Page.navigate", url=url)

    async def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        reply = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def wait(self, expression: str, seconds: float = 30.0) -> Any:
        """Until it is true."""
        async with asyncio.timeout(seconds):
            while not (value := await self.ask(expression)):
                await asyncio.sleep(0.1)
            return value

    async def text(self, selector: str) -> str:
        found: str = await self.ask(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    async def hover(self, selector: str, share: float) -> None:
        """Moves the pointer over an element, so far from its left edge as a share of its width."""
        await self.ask(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = await self.ask(
            f"(b => [b.x, b.y, b.width, b.height])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        x, y = box[0] + share * box[2], box[1] + box[3] / 2
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def picture(self, path: Path) -> None:
        """Of the whole page."""
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
        async with asyncio.timeout(60):
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
