"""POST /v1/chat/completions, and what other dialects make conversations of."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request

from slipstream.server.access.principal import principal_of
from slipstream.server.generating import fit_context, logprobs_asked, prepare_generation, require_choices
from slipstream.server.generation import Generation
from slipstream.server.openai.request import answer_options, logprob_formatter, make_generation
from slipstream.server.openai.sampling import sampling_params
from slipstream.server.openai.schema import ChatBody
from slipstream.server.openai.writers import AnswerOptions, ChatWriter
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.responses import GenerationResponse
from slipstream.server.service import Service


async def chat(service: Service, request: Request) -> GenerationResponse:
    arrival = time.monotonic()
    return answer_chat(service, request, await prepare_generation(service, request, "chat"), arrival)


def answer_chat(service: Service, request: Request, prepared: Prepared[ChatBody], arrival: float) -> GenerationResponse:
    """Raises what begin_chat raises."""
    generation, options = begin_chat(service, request, prepared, prepared.body, "chatcmpl-", arrival)
    body = prepared.body
    formatter, tells_thoughts = logprob_formatter(service, body), body.include_reasoning is not False
    writer = ChatWriter(generation, options, formatter, prepared.speech, tells_thoughts)
    return GenerationResponse(service, generation, writer, bool(body.stream))


def begin_chat(
    service: Service,
    request: Request,
    prepared: Prepared[Any],
    body: ChatBody,
    prefix: str,
    arrival: float,
    *,
    offsets: bool = False,
) -> tuple[Generation, AnswerOptions]:
    """The generation of a conversation that was prepared, and what is asked of its answer.

    ``prefix`` stands before the request's id in the id of the answer; ``offsets``: pieces tell where tokens begin.
    Raises what start_generation raises, and InvalidRequestError for what is too much.
    """
    [prompt] = prepared.prompts
    principal = principal_of(request.scope)
    model = service.require_model(body.model)
    require_choices(service, principal, body.n or 1)

    asked = body.answer_tokens
    room = fit_context(service, len(prompt), asked, "messages")
    logprobs = logprobs_asked(service, principal, body.top_logprobs or 0, "top_logprobs") if body.logprobs else None
    prompt_logprobs = logprobs_asked(service, principal, body.prompt_logprobs, "prompt_logprobs")
    logprobs_asked(service, principal, len(body.logprob_token_ids or ()), "logprob_token_ids")
    params = sampling_params(
        service, body, prepared, max_tokens=asked or room, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )
    generation = make_generation(
        service,
        request,
        body,
        prepared,
        prefix=prefix,
        param="messages",
        params=[params],
        arrival=arrival,
        offsets=offsets,
    )
    return generation, answer_options(service, body, model, logprobs, prompt_logprobs)
