"""A request of a batch to the routes of this server, without a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Scope

from slipstream.server.access.principal import SCOPE_ENTRY, Principal
from slipstream.server.telemetry import log


@dataclass
class CallAnswer:
    status: int = 500
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""

    @property
    def retry_after_s(self) -> float:
        return float(self.headers.get(b"retry-after", b"1"))


async def call(
    app: ASGIApp, path: str, body: bytes, headers: Mapping[str, str], principal: Principal, request_id: str
) -> CallAnswer:
    """What the route answers to a POST of ``principal``. Cancelling is what the client's going away would be."""
    log.request_id.set(request_id)
    sent = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    sent += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": sent,
        "client": None,
        "server": None,
        "state": {"request_id": request_id},
        SCOPE_ENTRY: principal,
    }
    answer, pieces = CallAnswer(), list[bytes]()
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            await asyncio.Event().wait()  # the client does not go away
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    answer.body = b"".join(pieces)
    return answer
