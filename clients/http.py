"""JSON over HTTP: one session with one key, and errors that say what the server said."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from slipstream.clients.errors import APIError, ClientError, UnreachableError, api_error
from slipstream.clients.retries import may_try_again, pause_before

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

# Below uvicorn's five seconds: a connection the server is about to close must not be picked for the next request.
KEEPALIVE_SECONDS = 2.0


class HttpClient:
    """Calls that answer JSON. Use as an async context manager, or close it."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        retries: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``timeout`` bounds a whole call in seconds, reading a stream to its end included; None waits for ever.

        ``retries``: how often what was not begun is tried again: a connection that could not be made, and answers that
        ask to come back later. ``headers`` go with every request.
        """
        self._retries = retries
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=timeout),
            # By a cookie a server knows which trainer sends weights, and aiohttp keeps none of an address otherwise.
            cookie_jar=aiohttp.CookieJar(unsafe=True),
            headers={**(headers or {}), **({"Authorization": f"Bearer {api_key}"} if api_key else {})},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def _object(self, method: str, path: str, body: Mapping[str, Any] | bytes | None = None) -> dict[str, Any]:
        reply = await self._body(method, path, body)
        try:
            data = _decode(reply)
        except msgspec.DecodeError:
            data = None
        if not isinstance(data, dict):
            raise ClientError(f"{method} {path} did not answer a JSON object: {reply[:200]!r}")
        return data

    async def _body(self, method: str, path: str, body: Mapping[str, Any] | bytes | None = None) -> bytes:
        response = await self._send(method, path, body)
        try:
            return await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnreachableError(f"{method} {path}: the answer broke off: {error!r}") from None
        finally:
            response.release()

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | bytes | None) -> aiohttp.ClientResponse:
        """Send JSON, or bytes as they are, and wait for the headers of an answer that is no error."""
        for attempt in range(self._retries):
            try:
                return await self._send_once(method, path, body)
            except APIError as refusal:
                if not may_try_again(refusal):
                    raise
                await asyncio.sleep(pause_before(attempt, refusal))
            except UnreachableError as error:
                if not isinstance(error.__context__, aiohttp.ClientConnectorError):
                    raise
                await asyncio.sleep(pause_before(attempt))
        return await self._send_once(method, path, body)

    async def _send_once(
        self, method: str, path: str, body: Mapping[str, Any] | bytes | None
    ) -> aiohttp.ClientResponse:
        data: Any = None
        headers = {}
        if isinstance(body, bytes):
            data = io.BytesIO(body)  # sent in parts: as bytes, a large body would hold up the loop
            headers["Content-Type"] = "application/octet-stream"
        elif body is not None:
            data, headers["Content-Type"] = _encode(body), "application/json"
        try:
            response = await self._session.request(method, self.base_url + path, data=data, headers=headers)
            if response.status < 400:
                return response
            async with response:
                raise api_error(response.status, await response.read(), response.headers.get("Retry-After"))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnreachableError(f"{method} {self.base_url}{path}: {error or type(error).__name__}") from None
