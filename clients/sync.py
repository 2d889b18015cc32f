"""Synchronous client for any OpenAI-compatible server, for scripts and terminals.

What was not begun is tried again: a connection that could not be made, and answers that ask to come back later (429,
503). A request that may have been begun never is, so nothing is generated twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from slipstream.clients.errors import APIError, BrokenStreamError, ClientError, UnreachableError, api_error
from slipstream.clients.retries import may_try_again, pause_before
from slipstream.clients.sse import SSEDecoder

_decode = msgspec.json.Decoder().decode


class Client:
    """``base_url`` is the server's root, with or without ``/v1``. Use as a context manager, or close it."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``timeout`` bounds the wait for the next bytes in seconds; ``retries`` what is tried again, see above.

        ``headers`` go with every request.
        """
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._retries = retries
        key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(timeout=timeout, headers={**(headers or {}), **key}, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /v1/chat/completions without streaming."""
        return self._object("POST", "/v1/chat/completions", body)

    def completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /v1/completions without streaming."""
        return self._object("POST", "/v1/completions", body)

    def chat_stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer as they come; ending the iteration early disconnects, which ends the request."""
        return self.stream("/v1/chat/completions", body)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """POST ``body`` with ``stream: true``.

        Raises APIError for an error event and BrokenStreamError where the stream ends without ``[DONE]``.
        """
        with self._sent("POST", path, {**body, "stream": True}) as response:
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise BrokenStreamError(f"{path} answered {kind}, not an event stream")
            decoder = SSEDecoder()
            try:
                for block in response.iter_raw():
                    for event in decoder.feed(block):
                        if event == b"[DONE]":
                            return
                        yield _chunk(response.status_code, event)
            except httpx.HTTPError as error:
                raise BrokenStreamError(f"connection lost in the middle of the stream: {error!r}") from None
        raise BrokenStreamError("the stream ended without [DONE]")

    def models(self) -> list[str]:
        """The names the server answers to."""
        return [model["id"] for model in self._object("GET", "/v1/models")["data"]]

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        tokens: list[int] = self._object("POST", "/tokenize", body)["tokens"]
        return tokens

    def detokenize(self, tokens: list[int]) -> str:
        text: str = self._object("POST", "/detokenize", {"tokens": tokens})["prompt"]
        return text

    def _object(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with self._sent(method, path, body) as response:
            try:
                reply = response.read()
            except httpx.HTTPError as error:
                raise UnreachableError(f"{method} {path}: the answer broke off: {error!r}") from None
        try:
            data = _decode(reply)
        except msgspec.DecodeError:
            data = None
        if not isinstance(data, dict):
            raise ClientError(f"{method} {path} did not answer a JSON object: {reply[:200]!r}")
        return data

    @contextmanager
    def _sent(self, method: str, path: str, body: Mapping[str, Any] | None) -> Iterator[httpx.Response]:
        """The headers of an answer that is no error, its body still to be read."""
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        for attempt in range(self._retries + 1):
            is_last = attempt == self._retries
            request = self._http.build_request(method, self.base_url + path, content=content, headers=headers)
            try:
                response = self._http.send(request, stream=True)
            except httpx.ConnectError as error:
                if is_last:
                    raise UnreachableError(f"{method} {self.base_url}{path}: {error}") from None
                time.sleep(pause_before(attempt))
                continue
            except httpx.HTTPError as error:
                raise UnreachableError(f"{method} {self.base_url}{path}: {error or type(error).__name__}") from None
            try:
                if response.status_code < 400:
                    yield response
                    return
                refusal = _error(response)
            finally:
                response.close()
            if is_last or not may_try_again(refusal):
                raise refusal
            time.sleep(pause_before(attempt, refusal))


def _error(response: httpx.Response) -> APIError:
    try:
        said = response.read()
    except httpx.HTTPError:
        said = b""
    return api_error(response.status_code, said, response.headers.get("Retry-After"))


def _chunk(status: int, event: bytes) -> dict[str, Any]:
    try:
        data = _decode(event)
    except msgspec.DecodeError as error:
        raise BrokenStreamError(f"event is not JSON ({error}): {event[:200]!r}") from None
    if not isinstance(data, dict) or ("error" in data and "choices" not in data):
        raise api_error(status, event)
    return data
