"""OpenVINO GenAI behind the completions API, as far as a load test asks: python openvino_server.py MODEL PORT THREADS

Runs in OpenVINO's own environment and imports nothing of ours. A thread steps the continuous batching, the event loop
does HTTP. Answers are token ids without text, so that the peer need not turn ids into text in Python.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import openvino_genai as genai

CACHE_GIB = 1
MAX_SEQUENCES = 64
Tokens = asyncio.Queue[list[int] | None]
"""New tokens of a request step by step; None after the last."""


class Stepping(threading.Thread):
    """Steps while there are requests."""

    def __init__(self, folder: str, threads: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs = CACHE_GIB, MAX_SEQUENCES
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self._tokenizer = self._pipeline.get_tokenizer()
        self._loop = loop
        self._arrivals: queue.SimpleQueue[tuple[str, Any, Tokens]] = queue.SimpleQueue()

    def submit(self, body: dict[str, Any]) -> Tokens:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = body.get("max_tokens", 16), body.get("ignore_eos", False)
        config.do_sample, config.apply_chat_template = False, False
        prompt = body.get("prompt")
        if prompt is None:
            prompt = self._tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        tokens: Tokens = asyncio.Queue()
        self._arrivals.put((prompt, config, tokens))
        return tokens

    def run(self) -> None:
        running: dict[int, tuple[Any, Tokens]] = {}
        for number in count():
            if self._arrivals.empty() and running:
                self._step(running)
                continue
            prompt, config, tokens = self._arrivals.get()
            running[number] = self._pipeline.add_request(number, prompt, config), tokens

    def _step(self, running: dict[int, tuple[Any, Tokens]]) -> None:
        self._pipeline.step()
        found: list[tuple[Tokens, list[int] | None]] = []
        for number, (handle, tokens) in list(running.items()):
            while handle.can_read():
                found += [(tokens, list(output.generated_ids)) for output in handle.read().values()]
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                found.append((tokens, None))
                del running[number]
        self._loop.call_soon_threadsafe(deliver, found)


def deliver(found: list[tuple[Tokens, list[int] | None]]) -> None:
    for tokens, new in found:
        tokens.put_nowait(new)


async def events(tokens: Tokens) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    total = 0
    while new := await tokens.get():
        total += len(new)
        choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": new, "finish_reason": None}
        yield event({"choices": [choice], "usage": {"completion_tokens": total}})
    yield event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    yield event({"choices": [], "usage": {"completion_tokens": total}})
    yield b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def head(status: str, kind: str, length: int | None = None) -> bytes:
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{body}\r\n\r\n".encode()


async def converse(stepping: Stepping, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A connection: one request after the other."""
    try:
        while line := await reader.readline():
            method, path, _ = line.split()
            length = 0
            while (header := await reader.readline()).strip():
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            body = await reader.readexactly(length)
            if method == b"POST" and path in (b"/v1/completions", b"/v1/chat/completions"):
                writer.write(head("200 OK", "text/event-stream"))
                async for data in events(stepping.submit(json.loads(body))):
                    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
                writer.write(b"0\r\n\r\n")
            else:
                known = {b"/health": {}, b"/v1/models": {"data": [{"id": "openvino"}]}}.get(path)
                answer = json.dumps(known if known is not None else {"error": {"message": "not here"}}).encode()
                status = "404 Not Found" if known is None else "200 OK"
                writer.write(head(status, "application/json", len(answer)) + answer)
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def main() -> None:
    folder, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    stepping = Stepping(folder, threads, asyncio.get_running_loop())
    stepping.start()
    server = await asyncio.start_server(lambda reader, writer: converse(stepping, reader, writer), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
