"""What the generating endpoints do alike on the way from a request to sequences."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from slipstream.engine.messages import NewRequest, SamplingParams, SpeculationParams
from slipstream.server.body import read_body
from slipstream.server.config import MAX_PRIORITY
from slipstream.server.consent import read_statement
from slipstream.server.errors import InvalidRequestError
from slipstream.server.generation import Generation, Sequence
from slipstream.server.openai.prepare import Prepared
from slipstream.server.openai.sampling import SEED_MASK, output_options, require_known_tokens
from slipstream.server.openai.schema import GenerationBody, Speculation
from slipstream.server.openai.writers import AnswerOptions
from slipstream.server.principal import principal_of
from slipstream.server.responses import cancelled_on_disconnect
from slipstream.server.service import Service
from slipstream.server.text import TurnEnds
from slipstream.server.text_work import INLINE_BYTES


async def prepare_generation(service: Service, request: Request, job: str) -> Prepared[Any]:
    """A generating request, unless the queue is full anyway."""
    service.require_ready()
    service.admit(1)
    prepared: Prepared[Any] = await prepare(service, request, job)
    return prepared


async def prepare(service: Service, request: Request, job: str) -> Any:
    """What a function of openai/prepare.py makes of the body.

    Raises ClientDisconnect when nobody waits for it any more.
    """
    service.require_ready()
    with service.bodies.hold() as held:
        raw = await read_body(request, service.config.max_body_bytes, held)
        if len(raw) <= INLINE_BYTES:
            return await service.work.run(job, raw)
        async with cancelled_on_disconnect(request.receive, None):
            return await service.work.run(job, raw)
        raise ClientDisconnect


def make_generation(
    service: Service,
    request: Request,
    body: GenerationBody,
    *,
    prefix: str,
    param: str,
    prompts: list[list[int]],
    params: SequenceOf[SamplingParams],
    arrival: float,
    ends: TurnEnds | None = None,
) -> Generation:
    """``params`` of each prompt, which differ in ``max_tokens`` only; ``ends`` of a conversation.

    The sequences are in the order prompt, choice.

    Raises:
        InvalidRequestError: the model lacks a token of a prompt (the field ``param``) or of the parameters.
    """
    require_known_tokens(service, prompts, params[0], param)
    choices = body.n or 1
    output = output_options(body, ends)
    speculation = speculation_params(service, body.speculation)
    priority = allowed_priority(service, body.priority or 0)
    said = read_statement(request, body.metadata, body.user, service.traffic.traffic_consent)
    traffic = said.kept(service.traffic.traffic_log)
    domain, tenant = said.domain, principal_of(request.scope).tenant(said.user)
    sequences: list[Sequence] = []
    for prompt, prompt_params in zip(prompts, params, strict=True):
        for choice in range(choices):
            request_id = service.engine.next_request_id()
            new = NewRequest(
                request_id=request_id,
                prompt=prompt,
                params=for_choice(prompt_params, body.seed, choice),
                priority=priority,
                cache_salt=body.cache_salt or "",
                tenant=tenant,
                domain=domain,
                traffic=traffic,
                route=service.route(request_id, tenant, domain),
                speculation=speculation,
                arrival=arrival,
                remember=said.level != "off",
            )
            sequences.append(Sequence(len(sequences), new, output, service))
    if body.request_id is not None:
        request.state.request_id = body.request_id
    return Generation(service, prefix + request.state.request_id, arrival, sequences, choices)


def allowed_priority(service: Service, priority: int) -> int:
    """Raises InvalidRequestError for one that would put a request further before others than the server lets it."""
    least = service.config.most_urgent_priority
    if priority < least:
        raise InvalidRequestError(
            f"priority: {least} to {MAX_PRIORITY} on this server, not {priority} (--most-urgent-priority)",
            param="priority",
        )
    return priority


def speculation_params(service: Service, wanted: Speculation | None) -> SpeculationParams:
    """Raises InvalidRequestError for a drafter this server does not have."""
    if wanted is None:
        return SpeculationParams()
    mode = wanted.mode or "auto"
    modes = ("auto", "off", *service.engine.ready.drafters)
    if mode not in modes:
        raise InvalidRequestError(
            f"speculation.mode: {mode!r} is none of {', '.join(modes)}; --speculation says which drafters there are",
            param="speculation.mode",
        )
    return SpeculationParams(mode, wanted.max_draft_tokens)


def for_choice(params: SamplingParams, seed: int | None, choice: int) -> SamplingParams:
    """With a seed, choice i draws from the stream of seed + i, whatever prompt it belongs to."""
    return params if seed is None else msgspec.structs.replace(params, seed=(seed + choice) & SEED_MASK)


def require_choices(service: Service, body: GenerationBody, prompts: int = 1) -> None:
    """Raises InvalidRequestError if n is too large, OverloadedError if there is no room for the sequences."""
    choices = body.n or 1
    if choices > service.config.max_n:
        raise InvalidRequestError(f"n: at most {service.config.max_n} (--max-n), not {choices}", param="n")
    service.admit(choices * prompts)


def answer_options(
    body: GenerationBody, model: str, created: int, logprobs: int | None, prompt_logprobs: int | None
) -> AnswerOptions:
    stream = body.stream_options
    return AnswerOptions(
        model=model,
        created=created,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_token_ids=bool(body.return_token_ids),
        return_metrics=bool(body.return_metrics),
        include_usage=stream is not None and bool(stream.include_usage),
        continuous_usage=stream is not None and bool(stream.include_usage and stream.continuous_usage_stats),
    )
