"""Async client for any OpenAI-compatible server, built for load generation.

A streamed chunk costs one JSON decode into plain dictionaries and no model validation. Times are
``time.perf_counter()`` seconds; chunks that arrive in one network read share one time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import perf_counter
from typing import Any, Self

import aiohttp
import msgspec

from slipstream.clients.errors import APIError, BrokenStreamError, ClientError, UnreachableError, api_error
from slipstream.clients.http import HttpClient
from slipstream.clients.sse import Chunk, SSEDecoder

_decode = msgspec.json.Decoder().decode


class Stream:
    """The chunks of one answer. Iteration ends at ``[DONE]``.

    Raises APIError for an error event and BrokenStreamError when the connection ends without ``[DONE]``.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._decoder = SSEDecoder()
        self._events: deque[tuple[float, bytes]] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._events:
            await self._receive()
        received, event = self._events.popleft()
        if event == b"[DONE]":
            await self._finish()
            raise StopAsyncIteration
        try:
            data = _decode(event)
        except msgspec.DecodeError as error:
            raise BrokenStreamError(f"event is not JSON ({error}): {event[:200]!r}") from None
        if "error" in data and "choices" not in data:
            raise api_error(self._response.status, event)
        return Chunk(received, data)

    async def _receive(self) -> None:
        block = await self._read()
        if not block:
            raise BrokenStreamError("the stream ended without [DONE]")
        received = perf_counter()
        self._events.extend((received, event) for event in self._decoder.feed(block))

    async def _finish(self) -> None:
        """Read to the end of the body, so that the connection can serve the next request."""
        while block := await self._read():
            self._events.extend((perf_counter(), event) for event in self._decoder.feed(block))
        if self._events:
            raise BrokenStreamError(f"an event follows [DONE]: {self._events[0][1][:200]!r}")

    async def _read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise BrokenStreamError(f"connection lost in the middle of the stream: {error!r}") from None


class AsyncClient(HttpClient):
    """``base_url`` is the server's root, with or without ``/v1``. Use as an async context manager, or close it."""

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /v1/chat/completions without streaming."""
        return await self._object("POST", "/v1/chat/completions", body)

    async def completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /v1/completions without streaming."""
        return await self._object("POST", "/v1/completions", body)

    def chat_stream(self, body: Mapping[str, Any]) -> AbstractAsyncContextManager[Stream]:
        """``async with client.chat_stream(body) as stream: async for chunk in stream: ...``"""
        return self.stream("/v1/chat/completions", body)

    def completions_stream(self, body: Mapping[str, Any]) -> AbstractAsyncContextManager[Stream]:
        return self.stream("/v1/completions", body)

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Stream]:
        """POST ``body`` with ``stream: true``; leaving the block before ``[DONE]`` disconnects."""
        response = await self._send("POST", path, {**body, "stream": True})
        try:
            if response.content_type != "text/event-stream":
                raise BrokenStreamError(f"{path} answered {response.content_type}, not an event stream")
            yield Stream(response)
        finally:
            response.close()

    async def models(self) -> list[str]:
        """The names the server answers to."""
        return [model["id"] for model in (await self._object("GET", "/v1/models"))["data"]]

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        reply = await self._object("POST", "/tokenize", {"prompt": text, "add_special_tokens": add_special_tokens})
        tokens: list[int] = reply["tokens"]
        return tokens

    async def detokenize(self, tokens: list[int]) -> str:
        text: str = (await self._object("POST", "/detokenize", {"tokens": tokens}))["prompt"]
        return text

    async def health(self) -> None:
        """GET /health; raises APIError if the server says that it is not well."""
        await self._body("GET", "/health")

    async def metrics(self) -> str:
        """The text of GET /metrics."""
        return (await self._body("GET", "/metrics")).decode()

    async def wait_ready(self, timeout: float) -> float:
        """Poll until the server takes requests; the seconds it took. Raises UnreachableError after ``timeout``.

        Ready is GET /health 200, or GET /v1/models 200 for servers without /health.
        """
        start = perf_counter()
        reason = "no answer"
        while perf_counter() - start < timeout:
            try:
                async with asyncio.timeout(5):
                    await self._check_ready()
                return perf_counter() - start
            except (ClientError, TimeoutError) as error:
                reason = str(error) or "no answer within 5 seconds"
            await asyncio.sleep(0.2)
        raise UnreachableError(f"{self.base_url} was not ready after {timeout:g} s: {reason}")

    async def _check_ready(self) -> None:
        try:
            await self.health()
        except APIError as error:
            if error.status != 404:
                raise
            await self.models()
