"""HTTP/1.1 as uvicorn speaks it, with bounds on the head of a request and with our errors for what is not HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from slipstream.server.errors import ApiError, HeadTooLargeError, InvalidRequestError, TooSlowError, UnavailableError
from slipstream.server.http.edge import REQUEST_ID, fresh_id

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0
STILL_WORKING = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What clients pass over before an answer."""
FIRST_SIGN_S, LONGEST_BETWEEN_SIGNS_S = 0.05, 10.0
RETRY_CONNECT_S = 5
OTHER_PROTOCOLS = {b"\x16\x03": "TLS (https)", b"PRI * HTTP/2.0": "HTTP/2"}
"""How others that clients are set to by mistake begin."""
AROUND_HEADER = len(b": \r\n")
UPGRADES = (b"upgrade", b"http2-settings")


@dataclass(frozen=True)
class ConnectionLimits:
    max_connections: int | None = None
    write_timeout_s: float = 30.0
    """How long a client may take to read what is waiting for it (uvicorn lets 64 KiB wait)."""
    on_cut: Callable[[], None] = lambda: None
    """Called for a connection that is closed because its client does not read."""
    is_ending: Callable[[], bool] = lambda: False
    """Whether an answer ends its connection: who asks again is to find a server that stays."""


class HttpProtocol(HttpToolsProtocol):
    """One connection. The parser keeps every header it sees, so without a bound a client could fill the memory; and
    what a client does not read stays in memory, so that cannot be for ever.

    Offers to go on in another protocol are ignored: HTTP clients of Java make one with their first request. The parser
    takes what follows such a head for the other protocol, so it reads the head again without the offer.

    Who has ended its side of the connection may have gone, or may wait for its answer: of what is sent to it, only one
    that has gone makes an error of the connection. So such a client is sent signs that the server still works until the
    answer begins. HTTP/1.0 has none, so its clients count as gone.
    """

    _head_bytes = 0
    """What came of the head that is awaited, without a beginning that came with the end of the request before."""
    _without_offer: bytes | None = None
    """The head that was read last, if it offers another protocol: the same head without that."""
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _sign_timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, limits: ConnectionLimits | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits or ConnectionLimits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = self._limits.max_connections
        if most is not None and len(self.connections) > most:
            message = f"the server has {most} connections, and takes no more (--max-connections)"
            self._refuse(UnavailableError(message, code="too_many_connections", retry_after_s=RETRY_CONNECT_S))
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._client_reads()
        if self._sign_timer is not None:
            self._sign_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        self._client_reads()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # it closes only when that has been read
            self._await_reader()

    def _await_reader(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._cut)

    def _client_reads(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._write_timer = None

    def _cut(self) -> None:
        self._limits.on_cut()
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        awaited = self._head_timer
        self._parse(data)
        if awaited is not None and self._head_timer is awaited:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(too_large())

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open: for the answer to a request that came as a whole."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.scope["http_version"] == "1.0":
            return False
        self._head_arrived()  # there will be no other
        cycle.keep_alive = False
        self._sign(cycle, FIRST_SIGN_S)
        return True

    def _sign(self, cycle: RequestResponseCycle, pause_s: float) -> None:
        """One that is sent to somebody who has gone fails, or is answered with an error that the next one meets."""
        if cycle.response_started or self.transport.is_closing():
            return
        if not self.pipeline:  # else it would come within the answer before
            self.transport.write(STILL_WORKING)
        later = min(2 * pause_s, LONGEST_BETWEEN_SIGNS_S)
        self._sign_timer = self.loop.call_later(pause_s, self._sign, cycle, later)

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as upgrade:
                head, self._without_offer = self._without_offer or b"", None
                data = head + data[upgrade.args[0] :]
                self.parser = HttpRequestParser(self)  # one that has read `Connection: close` reads nothing more
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except HttpParserError as error:
                if isinstance(error.__context__, ApiError):
                    self._refuse(error.__context__)
                    return
                others = (name for start, name in OTHER_PROTOCOLS.items() if data.startswith(start))
                if other := next(others, None):
                    message = f"this is {other}, and the server speaks plain HTTP/1.1 only"
                elif isinstance(error, HttpParserCallbackError):
                    if not isinstance(
                        error.__context__, HttpParserError
                    ):  # not of the target, which is looked at there
                        self.logger.error("a request could not be taken", exc_info=error.__context__)
                        self._refuse(ApiError("internal error; see the server's log"))
                        return
                    message = "this is no HTTP/1.1 request"
                else:
                    message = f"this is no HTTP/1.1 request: {error}"
                self.logger.warning("a client was refused: %s", message)
                self._refuse(InvalidRequestError(message, code="invalid_http"))
                return

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_arrived()
        if len(self.url) + sum(len(name) + len(value) + AROUND_HEADER for name, value in self.headers) > MAX_HEAD_BYTES:
            raise too_large()
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            version = self.parser.get_http_version()
            self._without_offer = b"".join(without_offer(method, self.url, version, self.headers))
            return
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            # uvicorn makes a task that sends the answer, which begins when this is done.
            self.cycle.send = until_closed(self.cycle)  # type: ignore[method-assign, assignment]
        if self._limits.is_ending():
            self.end_after_answer()

    def on_message_complete(self) -> None:
        if self._without_offer is None:
            super().on_message_complete()

    def end_after_answer(self) -> None:
        """Closes the connection if it waits for its next request, or else after the answer to what is under way.

        A request that is being sent is answered, also the first one of a connection.
        """
        if self.cycle is None or self._head_timer is not None:
            return
        if self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = None
        self._head_bytes = 0

    def _head_is_late(self) -> None:
        if self.scope is None:  # a connection opened in advance and never used
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


def too_large() -> HeadTooLargeError:
    return HeadTooLargeError(f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")


def without_offer(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    """The head of a request, in pieces, without what offers to go on in another protocol."""
    yield b"%b %b HTTP/%b\r\n" % (method, url, version.encode())
    for name, value in headers:
        if name == b"connection":
            value = b", ".join(option for option in value.split(b",") if option.strip().lower() not in UPGRADES)
        if name not in UPGRADES:
            yield b"%b: %b\r\n" % (name, value)
    yield b"\r\n"


def until_closed(cycle: RequestResponseCycle) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """Sends an answer whose length is not known as it is, up to the end of the connection: HTTP/1.0 has no chunks."""
    send = cycle.send
    has_length = True

    async def sending(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))  # uvicorn holds answers to their length
        await send(message)

    return sending
