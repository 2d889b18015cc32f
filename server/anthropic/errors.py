"""Errors as this dialect has them, wherever they come from: the routes, the gate, or a deadline."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.errors import ApiError

encode = msgspec.json.Encoder().encode
PATH = "/v1/messages"
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


DETAILS = {"thread": {"error_code": "thread_unsupported_request"}}
"""By the field that is refused: what a client looks for that goes on without it by itself."""


def error_body(status: int, message: str, request_id: str | None, param: str | None = None) -> bytes:
    error: dict[str, Any] = {"type": TYPES.get(status, "invalid_request_error"), "message": message}
    if status == 400 and param in DETAILS:
        error["details"] = DETAILS[param]
    return encode({"type": "error", "error": error, "request_id": request_id})


def error_event(error: ApiError) -> bytes:
    """The end of a stream that failed."""
    return b"event: error\ndata: " + error_body(error.status, error.message, None) + b"\n\n"


class TranslatedErrors:
    """Rewrites what answers of these routes say of errors, and names the request in a header of this dialect."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (scope["path"] == PATH or scope["path"].startswith(PATH + "/")):
            await self._app(scope, receive, send)
            return
        head: Message | None = None
        body = b""

        async def translating(message: Message) -> None:
            nonlocal head, body
            request_id: str = scope["state"]["request_id"]
            if message["type"] == "http.response.start":
                named = [*message.get("headers", ()), (b"request-id", request_id.encode())]
                message = {**message, "headers": named}
                if message["status"] >= 400:
                    head = message
                    return
            elif head is not None and message["type"] == "http.response.body":
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                body = error_of(head["status"], body, request_id)
                headers = [each for each in head["headers"] if each[0] != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await send({**head, "headers": headers})
                message = {**message, "body": body}
            await send(message)

        await self._app(scope, receive, translating)


def error_of(status: int, body: bytes, request_id: str) -> bytes:
    """What an error of any other route is here."""
    said, param = said_in(body)
    return error_body(status, said, request_id, param)


def said_in(body: bytes) -> tuple[str, str | None]:
    """What an error of any other route says, and of which field."""
    try:
        found: Any = msgspec.json.decode(body)["error"]
        return str(found["message"]), found.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "the request failed", None
