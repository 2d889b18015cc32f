"""Sends one list of requests to one server and records what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from slipstream.clients.aio import AsyncClient
from slipstream.clients.errors import APIError, ClientError
from slipstream.loadtest.arrivals import Arrivals, drive
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.workloads import COMPLETIONS, Request, Tokenizer


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test and how to ask it."""

    client: AsyncClient
    model: str
    chunk_usage: bool
    """Whether the server counts the tokens in every chunk (``stream_options.continuous_usage_stats``)."""
    tokenizer: Tokenizer | None
    """The client, if the server has /tokenize and /detokenize."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """JSON fields added to every body."""

    def body(self, request: Request) -> dict[str, Any]:
        options = {"include_usage": True}
        if self.chunk_usage:
            options["continuous_usage_stats"] = True
        return {"model": self.model, "stream_options": options, **request.body, **self.extra}


@dataclass(frozen=True, slots=True)
class Run:
    records: list[RequestRecord]
    duration: float
    """Seconds from the first request to the end of the last answer."""


@asynccontextmanager
async def connect(
    url: str,
    *,
    api_key: str | None = None,
    model: str | None = None,
    extra: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[Target]:
    """Find out the model's name and what the server offers; sends one request of one token.

    ``timeout`` bounds each request in seconds; ``headers`` go with all of them.
    """
    async with AsyncClient(url, api_key, timeout=timeout, headers=headers) as client:
        if model is None:
            names = await client.models()
            if not names:
                raise ClientError(f"{url} lists no model: name one with --model")
            model = names[0]
        target = Target(client, model, True, await _tokenizer(client), extra or {})
        if not await _counts_chunks(target):
            target = Target(client, model, False, target.tokenizer, target.extra)
        yield target


async def _tokenizer(client: AsyncClient) -> Tokenizer | None:
    try:
        tokens = await client.tokenize("two words")
        if tokens and "words" in await client.detokenize(tokens):
            return client
    except (ClientError, KeyError):
        pass  # no such endpoint, or another dialect of it
    return None


async def _counts_chunks(target: Target) -> bool:
    """Whether the server takes ``continuous_usage_stats`` and acts on it."""
    request = Request(COMPLETIONS, {"prompt": "Hello", "max_tokens": 2, "temperature": 0})
    try:
        async with target.client.stream(request.path, target.body(request)) as stream:
            return any([chunk.data.get("choices") and chunk.data.get("usage") async for chunk in stream])
    except APIError as error:
        if error.status not in (400, 422):
            raise
    return False


async def measure(
    target: Target,
    requests: Sequence[Request],
    arrivals: Arrivals,
    on_end: Callable[[bool], None] = lambda ok: None,
) -> Run:
    """Send ``requests`` as ``arrivals`` says; failed ones are in the records like the others.

    ``on_end`` is called at the end of each request with whether it went well.
    """
    records: list[RequestRecord] = []

    async def send(request: Request, due: float) -> None:
        record = RequestRecord(due=due, start=perf_counter())
        records.append(record)
        await receive(target, request, record)
        on_end(record.ok)

    start = perf_counter()
    await drive(requests, arrivals, send)
    return Run(records, perf_counter() - start)


async def receive(target: Target, request: Request, record: RequestRecord, max_chunks: int | None = None) -> bool:
    """Send one request now and fill ``record``; an error of the server ends up in ``record.error``.

    Disconnects once ``max_chunks`` token chunks are there. True if that happened before the stream's end.
    """
    try:
        async with target.client.stream(request.path, target.body(request)) as stream:
            async for chunk in stream:
                record.add(chunk)
                if max_chunks is not None and len(record.chunk_times) >= max_chunks:
                    return True
    except ClientError as error:
        record.error = str(error)
        record.end = perf_counter()
        return False
    if len(record.finish_reasons) != 1:
        record.error = f"the stream had {len(record.finish_reasons)} finish reasons instead of one"
    return False
