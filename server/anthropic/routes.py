"""The routes of Anthropic's dialect."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from slipstream.server.anthropic import answers
from slipstream.server.anthropic.errors import error_event
from slipstream.server.anthropic.prepare import Conversing
from slipstream.server.anthropic.schema import BODIES, CountTokensBody, MessagesBody
from slipstream.server.anthropic.writer import MessageWriter
from slipstream.server.generating import answer_without_engine, prepare_generation
from slipstream.server.http.description import BUSY, describe
from slipstream.server.openai.chat import begin_chat
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.responses import GenerationResponse
from slipstream.server.service import Service

DESCRIBED = (*BODIES, *answers.ANSWERS)


def anthropic_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    @router.post(
        "/v1/messages",
        openapi_extra=describe(
            answers.MessageAnswer,
            *BUSY,
            bodies=[MessagesBody],
            stream=answers.MessageEvent,
            stream_end="",
            every_error=answers.MessageErrorAnswer,
        ),
    )
    async def messages(request: Request) -> Response:
        """Continue a conversation of blocks."""
        arrival = time.monotonic()
        prepared: Prepared[Conversing] = await prepare_generation(service, request, "converse")
        generation, options = begin_chat(service, request, prepared, prepared.body.chat, "msg_", arrival)
        asked = prepared.body.asked
        shows_thinking = asked.thinking is None or asked.thinking.display != "omitted"
        writer = MessageWriter(generation, options.model, prepared.speech, shows_thinking)
        return GenerationResponse(service, generation, writer, bool(asked.stream), error_event)

    @router.post(
        "/v1/messages/count_tokens",
        openapi_extra=describe(
            answers.MessageTokens, *BUSY, bodies=[CountTokensBody], every_error=answers.MessageErrorAnswer
        ),
    )
    async def count_tokens(request: Request) -> Response:
        """How many tokens a conversation has."""
        return await answer_without_engine(service, request, "count_message_tokens")

    return router
