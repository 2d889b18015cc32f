"""From an OpenAI body to what every dialect asks for, and to how the answer is written."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

from fastapi import Request

from slipstream.engine.messages import SamplingParams, SpeculationParams
from slipstream.server.generating import GenerationRequest, start_generation
from slipstream.server.generation import Generation
from slipstream.server.openai.logprobs import LogprobFormatter
from slipstream.server.openai.sampling import output_options
from slipstream.server.openai.schema import GenerationBody, RolloutBody, Speculation
from slipstream.server.openai.writers import AnswerOptions
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.rollout.groups import Rollout
from slipstream.server.service import Service


def make_generation(
    service: Service,
    request: Request,
    body: GenerationBody,
    prepared: Prepared[Any],
    *,
    prefix: str,
    param: str,
    params: SequenceOf[SamplingParams],
    arrival: float,
    offsets: bool = False,
) -> Generation:
    """``params`` of each prompt, which differ in ``max_tokens`` only; ``param`` is the field of the prompts.
    ``offsets``: pieces tell where tokens begin.

    ``prefix`` stands before the request's id in the id of the answer. Raises what start_generation raises.
    """
    asked = GenerationRequest(
        prompts=prepared.prompts,
        params=params,
        param=param,
        output=replace(output_options(body, prepared), offsets=offsets),
        choices=body.n or 1,
        seed=body.seed,
        speculation=speculation_params(body.speculation),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        user=body.user,
        metadata=body.metadata or {},
        answer_prefix=prefix,
        request_id=body.request_id,
        rollout=rollout_of(body.rollout),
        timeout_s=body.timeout_s,
        adapter=service.adapters.of(body.model),
        arrival=arrival,
    )
    return start_generation(service, request, asked)


def speculation_params(wanted: Speculation | None) -> SpeculationParams:
    return SpeculationParams() if wanted is None else SpeculationParams(wanted.mode or "auto", wanted.max_draft_tokens)


def rollout_of(said: RolloutBody | None) -> Rollout | None:
    return None if said is None else Rollout(said.group or "", said.enough or 0, said.expected_tokens or 0)


def system_fingerprint(service: Service) -> str:
    """Another one where the same request may be answered otherwise: by other code, weights or number formats."""
    ready = service.engine.ready
    numbers = (ready.weights, ready.dtype, ready.kv_cache_dtype, ready.kernels, ready.device)
    return _fingerprint(service.engine_config.model, service.control.weight_version, *numbers)


@lru_cache
def _fingerprint(*told: str) -> str:
    return f"fp_{blake2b(repr((version('slipstream'), *told)).encode(), digest_size=6).hexdigest()}"


def logprob_formatter(service: Service, body: GenerationBody) -> LogprobFormatter:
    as_ids = bool(body.return_tokens_as_token_ids)
    return LogprobFormatter(service.text.tokenizer, as_ids, body.logprob_token_ids or ())


def answer_options(
    service: Service, body: GenerationBody, model: str, logprobs: int | None, prompt_logprobs: int | None
) -> AnswerOptions:
    stream = body.stream_options
    return AnswerOptions(
        model=model,
        created=int(time.time()),
        system_fingerprint=system_fingerprint(service),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_token_ids=bool(body.return_token_ids),
        return_metrics=bool(body.return_metrics),
        include_usage=stream is not None and bool(stream.include_usage),
        continuous_usage=stream is not None and bool(stream.include_usage and stream.continuous_usage_stats),
    )
