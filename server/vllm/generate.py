"""POST /inference/v1/generate: token ids in, token ids out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import Request

from slipstream.engine.messages import TokenLogprobs
from slipstream.server.access.principal import principal_of
from slipstream.server.generating import (
    GenerationRequest,
    fit_context,
    logprobs_asked,
    prepare_generation,
    require_choices,
    start_generation,
)
from slipstream.server.generation import Generation, Piece, Sequence
from slipstream.server.openai.logprobs import LOWEST, LogprobFormatter
from slipstream.server.openai.sampling import output_options, sampling_params
from slipstream.server.openai.writers import usage
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.responses import DONE, GenerationResponse
from slipstream.server.service import Service
from slipstream.server.vllm.schema import TokensInBody

encode = msgspec.json.Encoder().encode


async def generate_tokens(service: Service, request: Request) -> GenerationResponse:
    arrival = time.monotonic()
    prepared: Prepared[TokensInBody] = await prepare_generation(service, request, "tokens_in")
    body, [prompt] = prepared.body, prepared.prompts
    wanted = body.sampling_params.with_defaults()
    principal = principal_of(request.scope)
    model = service.require_model(body.model)
    require_choices(service, principal, wanted.n or 1)
    room = fit_context(service, len(prompt), None, "token_ids")
    tokens = wanted.logprob_token_ids or ()
    logprobs_asked(service, principal, len(tokens), "sampling_params.logprob_token_ids")
    number = 0 if tokens and wanted.logprobs is None else wanted.logprobs
    logprobs = logprobs_asked(service, principal, number, "sampling_params.logprobs")
    prompt_logprobs = logprobs_asked(service, principal, wanted.prompt_logprobs, "sampling_params.prompt_logprobs")
    params = sampling_params(
        service,
        wanted,
        prepared,
        max_tokens=room if wanted.max_tokens is None else min(wanted.max_tokens, room),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    generation = start_generation(
        service,
        request,
        GenerationRequest(
            prompts=[prompt],
            params=[params],
            param="token_ids",
            output=replace(output_options(wanted, prepared), interval=wanted.stream_interval or 0),
            choices=wanted.n or 1,
            seed=wanted.seed,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            request_id=body.request_id,
            adapter=service.adapters.of(model),
            arrival=arrival,
        ),
    )
    formatter = LogprobFormatter(service.text.tokenizer, body.output_mode != "text", tokens)
    writer = TokensOutWriter(generation, body, model, logprobs, prompt_logprobs, formatter)
    return GenerationResponse(service, generation, writer, bool(body.stream))


def weight_versions(sequence: Sequence) -> list[dict[str, Any]]:
    """Which weights sampled which tokens."""
    spans = sequence.weight_spans
    ends = [*(span.first for span in spans), sequence.num_tokens][1:]
    return [{"version": span.version, "start": span.first, "end": end} for span, end in zip(spans, ends, strict=True)]


class TokensOutWriter:
    def __init__(
        self,
        generation: Generation,
        body: TokensInBody,
        model: str,
        logprobs: int | None,
        prompt_logprobs: int | None,
        formatter: LogprobFormatter,
    ) -> None:
        self._generation = generation
        self._body = body
        self._model = model
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self._formatter = formatter
        self._mode = body.output_mode or "tokens"

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        if not piece.tokens and not piece.text and piece.finish_reason is None:
            return b""
        first = piece.first and sequence.index == 0
        return self._event([self._choice(sequence, piece)], self._of_prompt() if first else {})

    def end(self) -> bytes:
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return DONE
        return self._event([], {"usage": usage(self._generation)}) + DONE

    def body(self, answers: list[Piece]) -> bytes:
        first = self._generation.sequences[0]
        found: dict[str, Any] = {
            "request_id": self._generation.name,
            "output_mode": self._mode,
            "model": self._model,
            "created": int(time.time()),
            "choices": [
                self._choice(sequence, answer)
                for sequence, answer in zip(self._generation.sequences, answers, strict=True)
            ],
            "usage": usage(self._generation),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
        }
        if self._prompt_logprobs is not None:
            found["prompt_logprobs"] = self._formatter.prompt(first.prompt_logprobs, self._prompt_logprobs)
        return encode(found | self._of_prompt())

    def _event(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
        event = {"request_id": self._generation.name, "output_mode": self._mode, "choices": choices} | extra
        return b"data: " + encode(event) + b"\n\n"

    def _of_prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._generation.sequences[0].prompt} if self._body.return_token_ids else {}

    def _choice(self, sequence: Sequence, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": sequence.index,
            "token_ids": piece.tokens,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "logprobs": None,
            "routed_experts": None,
            "sampling_mask": None,
            "weight_versions": None if piece.finish_reason is None else weight_versions(sequence),
        }
        if self._mode == "text":
            choice["text"] = piece.text
        if self._logprobs is not None:
            if self._mode == "text":
                choice["logprobs"] = self._formatter.chat(piece.logprobs, self._logprobs)
            else:
                choice["logprobs"] = {"content": [self._position(entry) for entry in piece.logprobs]}
        return choice

    def _position(self, entry: TokenLogprobs) -> dict[str, Any]:
        """The sampled token comes first, then the likeliest, or those that were asked for, whose ranks are unknown."""
        told: dict[int, tuple[float, int | None]] = {entry.token: (entry.logprob, entry.rank)}
        asked = self._body.sampling_params.logprob_token_ids
        likeliest = () if asked else enumerate(entry.top, start=1)
        for rank, (token, logprob) in likeliest:
            told.setdefault(token, (logprob, rank))
        for token, logprob in zip(asked or (), entry.asked, strict=True):
            told.setdefault(token, (logprob, None))
        top = [self._candidate(token, *found) for token, found in told.items()]
        return self._candidate(entry.token, entry.logprob, entry.rank) | {"top_logprobs": top}

    def _candidate(self, token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        """``token`` is what earlier versions of vLLM write, and clients of those read, in place of ``token_id``."""
        return {
            "token_id": token,
            "token": self._formatter.name(token),
            "logprob": max(logprob, LOWEST),
            "rank": rank,
        }
