"""POST /tokenize and /detokenize"""

from __future__ import annotations

from fastapi import Request, Response

from slipstream.server.generating import prepare
from slipstream.server.responses import LargeResponse
from slipstream.server.service import Service


async def tokenize(service: Service, request: Request) -> Response:
    return LargeResponse(service, await prepare(service, request, "tokenize"))


async def detokenize(service: Service, request: Request) -> Response:
    return LargeResponse(service, await prepare(service, request, "detokenize"))
