"""POST /v1/completions"""

from __future__ import annotations

import time

import msgspec
from fastapi import Request

from slipstream.server.access.principal import principal_of
from slipstream.server.generating import fit_context, logprobs_asked, prepare_generation, require_choices
from slipstream.server.openai.request import answer_options, logprob_formatter, make_generation
from slipstream.server.openai.sampling import sampling_params
from slipstream.server.openai.schema import ALL_ROOM, CompletionBody
from slipstream.server.openai.writers import CompletionWriter
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.responses import GenerationResponse
from slipstream.server.service import Service

DEFAULT_MAX_TOKENS = 16


async def complete(service: Service, request: Request) -> GenerationResponse:
    arrival = time.monotonic()
    return answer_completions(service, request, await prepare_generation(service, request, "complete"), arrival)


def answer_completions(
    service: Service, request: Request, prepared: Prepared[CompletionBody], arrival: float
) -> GenerationResponse:
    """Raises what start_generation raises, and InvalidRequestError for what is too much."""
    body, prompts = prepared.body, prepared.prompts
    principal = principal_of(request.scope)
    model = service.require_model(body.model)
    require_choices(service, principal, body.n or 1, len(prompts))

    asked = None if body.max_tokens == ALL_ROOM else body.max_tokens
    rooms = [fit_context(service, len(prompt), asked, "prompt") for prompt in prompts]
    if asked is None:
        asked = max(rooms) if body.max_tokens == ALL_ROOM else DEFAULT_MAX_TOKENS
    logprobs = logprobs_asked(service, principal, body.logprobs, "logprobs")
    prompt_logprobs = logprobs_asked(service, principal, body.prompt_logprobs, "prompt_logprobs")
    logprobs_asked(service, principal, len(body.logprob_token_ids or ()), "logprob_token_ids")
    of_prompt = [value for value in (prompt_logprobs, logprobs if body.echo else None) if value is not None]
    params = sampling_params(
        service,
        body,
        prepared,
        max_tokens=min(asked, *rooms),
        logprobs=logprobs,
        prompt_logprobs=max(of_prompt, default=None),
    )
    generation = make_generation(
        service,
        request,
        body,
        prepared,
        prefix="cmpl-",
        param="prompt",
        params=[msgspec.structs.replace(params, max_tokens=min(asked, room)) for room in rooms],
        arrival=arrival,
        offsets=logprobs is not None,
    )
    echo = None
    if body.echo:
        skip = body.skip_special_tokens is not False
        shown = prepared.texts or [service.text.tokenizer.decode(prompt, skip) for prompt in prompts]
        echo = [text for text in shown for _ in range(body.n or 1)]
    options = answer_options(service, body, model, logprobs, prompt_logprobs)
    writer = CompletionWriter(generation, options, logprob_formatter(service, body), echo)
    return GenerationResponse(service, generation, writer, bool(body.stream))
