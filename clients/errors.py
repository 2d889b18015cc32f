"""Errors of the clients.

ClientError
├── UnreachableError    no answer: refused, reset, timed out
├── APIError            the server said what is wrong (HTTP status, OpenAI error body), also inside a stream
└── BrokenStreamError   the stream ended before ``[DONE]`` or is not an event stream
"""

from __future__ import annotations

from typing import Any

import msgspec


class ClientError(Exception):
    """Anything that keeps a call from giving its result."""


class UnreachableError(ClientError):
    """The server could not be reached or dropped the connection before it answered."""


class BrokenStreamError(ClientError):
    """The answer is not a complete event stream."""


class APIError(ClientError):
    """An error reported by the server.

    ``status`` is the HTTP status: 200 for an error event inside a stream that had begun. ``retry_after`` is the
    header of that name in seconds, where the server sent one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{status} {kind or 'error'}: {message}")
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after


def api_error(status: int, body: bytes, retry_after: str | None = None) -> APIError:
    """Read an error body: nested or flat OpenAI form, FastAPI's ``detail``, or plain text."""
    try:
        seconds = float(retry_after) if retry_after else None
    except ValueError:
        seconds = None
    try:
        data: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return APIError(status, body.decode(errors="replace").strip() or "empty body", retry_after=seconds)
    fields: Any = data
    if isinstance(data, dict):
        fields = data.get("error") or data.get("detail") or data
    if isinstance(fields, dict) and "message" in fields:
        return APIError(
            status,
            str(fields["message"]),
            kind=fields.get("type"),
            param=fields.get("param"),
            code=fields.get("code"),
            retry_after=seconds,
        )
    message = fields if isinstance(fields, str) else msgspec.json.encode(fields).decode()
    return APIError(status, message, retry_after=seconds)
