"""An OpenAI-compatible server on a socket whose timing and faults a test decides."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import pytest
from aiohttp import web

from slipstream.loadtest.dataset import default_path

WORD = re.compile(r"\s*\S+|\s+")


@dataclass
class Served:
    """A server that computes one prompt after the other (``prefill`` seconds per token) and streams at ``pace``."""

    ttft: float = 0.0
    prefill: float = 0.0
    pace: float = 0.002
    """Seconds between chunks."""
    tokens_per_chunk: int = 1
    usage: bool = True
    chunk_usage: bool = True
    tokenizer: bool = True
    special_tokens: int = 0
    stalls: bool = False
    """Whether a prompt that is computed holds up all streams."""
    cache: bool = False
    """Whether a prompt seen before costs nothing."""
    gauges: bool = True
    together: int = 0
    """No answer begins before so many requests were under way at once."""
    leak: int = 0
    """Requests that count as running for ever."""
    fault: str = ""
    """What goes wrong with the next request: error, mid-error, break, no-finish, two-finishes."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    on_request: Callable[[], None] = lambda: None
    running: int = 0
    most_running: int = 0
    disconnects: int = 0
    url: str = ""
    _words: dict[str, int] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _device: asyncio.Lock = field(default_factory=asyncio.Lock)

    def ids(self, text: str) -> list[int]:
        return [self._words.setdefault(word, len(self._words)) for word in WORD.findall(text)]

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted"}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizer:
            raise web.HTTPNotFound
        body = await request.json()
        special = [-1] * self.special_tokens if body.get("add_special_tokens", True) else []
        return web.json_response({"tokens": special + self.ids(body["prompt"])})

    async def detokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizer:
            raise web.HTTPNotFound
        words = list(self._words)
        return web.json_response({"prompt": "".join(words[i] for i in (await request.json())["tokens"])})

    async def metrics(self, request: web.Request) -> web.Response:
        if not self.gauges:
            raise web.HTTPNotFound
        busy = self.running + self.leak
        return web.Response(
            text=f'slipstream:num_requests_running{{engine="0"}} {busy}\n'
            f"slipstream:num_requests_waiting 0\nslipstream:kv_cache_usage_perc {busy / 100}\n"
            "slipstream:num_preemptions_total 3\n"
        )

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.on_request()
        fault, self.fault = self.fault, ""
        if not self.chunk_usage and body["stream_options"].get("continuous_usage_stats"):
            return web.json_response({"error": {"message": "unknown field", "type": "bad"}}, status=400)
        if fault == "error":
            return web.json_response({"error": {"message": "scripted refusal", "type": "bad"}}, status=400)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        while self.most_running < self.together:
            await asyncio.sleep(0.001)
        try:
            return await self._stream(request, body, fault)
        except (ConnectionError, asyncio.CancelledError):
            self.disconnects += 1
            raise
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        chat = "messages" in body
        prompt = "\n".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
        prompt_tokens, total = len(self.ids(prompt)) + self.special_tokens, body["max_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(delta: str | None, sent: int, finish: str | None = None) -> None:
            piece = {"delta": {"content": delta}} if chat else {"text": delta}
            chunk: dict[str, Any] = {"choices": [{"index": 0, **piece, "finish_reason": finish}]}
            if self.chunk_usage and body["stream_options"].get("continuous_usage_stats"):
                chunk["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": sent}
            await self._event(response, chunk)

        if chat:
            await self._event(response, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(self.ttft)
        async with self._device:
            await asyncio.sleep(0 if self.cache and prompt in self._seen else self.prefill * prompt_tokens)
        self._seen.add(prompt)
        sent = 0
        while sent < total:
            if sent:
                await asyncio.sleep(self.pace)
                if self.stalls:
                    async with self._device:
                        pass
            new = min(self.tokens_per_chunk, total - sent)
            sent += new
            await send(" word" * new, sent)
            if fault == "break":
                request.transport.close()
                return response
            if fault == "mid-error":
                await self._event(response, {"error": {"message": "scripted failure", "type": "server_error"}})
                return response
        for _ in range({"no-finish": 0, "two-finishes": 2}.get(fault, 1)):
            await send("", sent, "length")
        if self.usage:
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": sent}
            await self._event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _event(self, response: web.StreamResponse, data: dict[str, Any]) -> None:
        await response.write(b"data: " + web.json_response(data).body + b"\n\n")


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Served]:
    served = Served(**options)
    app = web.Application()
    app.router.add_get("/v1/models", served.models)
    app.router.add_get("/metrics", served.metrics)
    app.router.add_post("/tokenize", served.tokenize)
    app.router.add_post("/detokenize", served.detokenize)
    app.router.add_post("/v1/chat/completions", served.generate)
    app.router.add_post("/v1/completions", served.generate)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield served
    finally:
        await runner.cleanup()


class Waiting:
    """A clock that goes while an event loop waits, and by ITERATION_S for what it does between two waits.

    So times are those that servers and clients here wait for, however long the machine takes for everything else.

    ``leaps``: nothing but this loop's own servers and clients is waited for, no process and no thread. Then nothing
    happens while none of them has anything to say, and that time is over at once; but for GRACE_S, in case that the
    kernel still carries something from one to the other.
    """

    ITERATION_S = 1e-5
    GRACE_S = 1e-3

    def __init__(self, loop: Any, leaps: bool) -> None:
        self._now, self._select, self._leaps = loop.time(), loop._selector.select, leaps

    def now(self) -> float:
        return float(self._now)

    def select(self, timeout: float | None = None) -> Any:
        began = monotonic()
        leaps = self._leaps and timeout is not None
        ready = self._select(min(timeout, self.GRACE_S) if leaps else timeout)
        waited = monotonic() - began
        if timeout is not None:
            waited = min(waited, max(timeout, 0.0)) if ready else max(timeout, 0.0)
        self._now += waited + self.ITERATION_S
        return ready


def go_by(monkeypatch: pytest.MonkeyPatch, leaps: bool) -> None:
    """What is measured, and when sleepers wake up, goes by such a clock."""
    loop: Any = asyncio.get_running_loop()
    clock = Waiting(loop, leaps)
    monkeypatch.setattr(loop, "time", clock.now)
    monkeypatch.setattr(loop._selector, "select", clock.select)
    for name, module in list(sys.modules.items()):
        if name.startswith(("slipstream.clients.", "slipstream.loadtest.")) and hasattr(module, "perf_counter"):
            monkeypatch.setattr(module, "perf_counter", clock.now)


@pytest.fixture
async def time_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    go_by(monkeypatch, leaps=False)


@pytest.fixture
async def time_that_leaps(monkeypatch: pytest.MonkeyPatch) -> None:
    go_by(monkeypatch, leaps=True)


@pytest.fixture
def serve() -> Any:
    """``async with serve(pace=0.01) as server``"""
    return serving


@pytest.fixture(scope="session")
def sharegpt() -> Any:
    try:
        return default_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
