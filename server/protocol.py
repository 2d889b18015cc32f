"""HTTP/1.1 as uvicorn speaks it, with bounds on the head of a request and with our errors for what is not HTTP."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from slipstream.server.edge import REQUEST_ID, fresh_id
from slipstream.server.errors import ApiError, HeadTooLargeError, InvalidRequestError, TooSlowError

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0


class HttpProtocol(HttpToolsProtocol):
    """One connection. The parser keeps every header it sees, so without a bound a client could fill the memory."""

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLargeError(f"the head of the request is larger than {MAX_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequestError(msg, code="invalid_http"))

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = None
        self._head_bytes = 0

    def _head_is_late(self) -> None:
        if self._head_bytes == 0:  # a connection opened in advance and never used
            self.transport.close()
            return
        self._refuse(TooSlowError(f"the head of the request took longer than {HEAD_TIMEOUT_S:g} s"))

    def _refuse(self, error: ApiError) -> None:
        self._head_arrived()
        if self.transport.is_closing():
            return
        body = error.body()
        status = HTTPStatus(error.status)
        headers = [*error.headers(), (REQUEST_ID, fresh_id().encode())]
        headers += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        lines = [b"HTTP/1.1 %d %b" % (status, status.phrase.encode()), *(b": ".join(header) for header in headers)]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.transport.close()
