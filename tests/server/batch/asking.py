"""Batches of requests as the OpenAI client sends them."""

from __future__ import annotations

import io
import json
from typing import Any

import openai

WINDOW: Any = "24h"


def client_of(server: Any, key: str = "key-one") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def request(number: int, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    if not body:
        body = {"messages": [{"role": "user", "content": f"Say {number}"}], "max_tokens": 4, "seed": number}
    return {"custom_id": f"request-{number}", "method": "POST", "url": url, "body": body}


def upload(client: openai.OpenAI, content: bytes) -> str:
    return client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch").id


def begin(client: openai.OpenAI, lines: list[Any], url: Any = "/v1/chat/completions", window: Any = WINDOW) -> Any:
    return client.batches.create(
        input_file_id=upload(client, jsonl(lines)),
        endpoint=url,
        completion_window=window,
        metadata={"name": "nightly"},
    )


def ended(server: Any, client: openai.OpenAI, batch: Any) -> Any:
    def found() -> Any:
        now = client.batches.retrieve(batch.id)
        return now if now.status in ("completed", "failed", "cancelled", "expired") else None

    return server.wait_until(found)


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "an answer is there twice"
    return found


def long_requests(count: int, tokens: int = 3000) -> list[Any]:
    body = {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True}
    return [request(number, "/v1/completions", **body) for number in range(count)]
