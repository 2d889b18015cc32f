"""POST /invocations: what a body asks for, where a machine has one route for everything, as those of SageMaker do."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request, Response

from slipstream.server.generating import prepare_generation
from slipstream.server.openai.chat import answer_chat
from slipstream.server.openai.completions import answer_completions
from slipstream.server.openai.embeddings import answer_embeddings
from slipstream.server.openai.schema import ChatBody, CompletionBody
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.service import Service


async def invoke(service: Service, request: Request) -> Response:
    arrival = time.monotonic()
    prepared: Prepared[Any] = await prepare_generation(service, request, "invoke")
    if isinstance(prepared.body, ChatBody):
        return answer_chat(service, request, prepared, arrival)
    if isinstance(prepared.body, CompletionBody):
        return answer_completions(service, request, prepared, arrival)
    return await answer_embeddings(service, request, prepared, arrival)
