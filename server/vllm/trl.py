"""The generating routes of ``trl vllm-serve``: several prompts at once, and lists of numbers back."""

from __future__ import annotations

import math
import time
from array import array
from base64 import b64encode
from typing import Any

import msgspec
from fastapi import Request

from slipstream.engine.messages import TokenLogprobs
from slipstream.server.access.principal import principal_of
from slipstream.server.errors import InvalidRequestError
from slipstream.server.generating import (
    GenerationRequest,
    fit_context,
    logprobs_asked,
    prepare_generation,
    require_choices,
    start_generation,
)
from slipstream.server.generation import Generation, OutputOptions, Piece, Sequence
from slipstream.server.openai.logprobs import LOWEST
from slipstream.server.openai.sampling import output_options, sampling_params
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.responses import GenerationResponse
from slipstream.server.service import Service
from slipstream.server.vllm.schema import TrlScoreBody, VllmSampling

DEFAULT_MAX_TOKENS = 16
PLAIN = VllmSampling.model_validate({}).with_defaults()
encode = msgspec.json.Encoder().encode


async def trl_generate(service: Service, request: Request) -> GenerationResponse:
    return await answer(service, request, "trl_generate", "prompts")


async def trl_chat(service: Service, request: Request) -> GenerationResponse:
    return await answer(service, request, "trl_chat", "messages")


async def answer(service: Service, request: Request, job: str, param: str) -> GenerationResponse:
    """``param`` is the field of the prompts."""
    arrival = time.monotonic()
    prepared: Prepared[VllmSampling] = await prepare_generation(service, request, job)
    wanted, prompts = prepared.body, prepared.prompts
    principal = principal_of(request.scope)
    choices = wanted.n or 1
    require_choices(service, principal, choices, len(prompts))
    rooms = [fit_context(service, len(prompt), None, param) for prompt in prompts]
    asked = DEFAULT_MAX_TOKENS if wanted.max_tokens is None else wanted.max_tokens
    if asked == 0:
        raise InvalidRequestError("at least one token must be asked for", param="max_tokens")
    if wanted.logprob_token_ids:
        raise InvalidRequestError(
            "logprob_token_ids: this route tells of the likeliest tokens only; use /inference/v1/generate",
            param="logprob_token_ids",
            code="unsupported_parameter",
        )
    # TRL starts its server with the log-probabilities of what tokens were sampled from.
    wanted.logprobs_mode = wanted.logprobs_mode or "processed"
    params = sampling_params(
        service,
        wanted,
        prepared,
        max_tokens=min(asked, *rooms),
        logprobs=logprobs_asked(service, principal, wanted.logprobs, "logprobs"),
        prompt_logprobs=None,
    )
    asked_for = GenerationRequest(
        prompts=prompts,
        params=[msgspec.structs.replace(params, max_tokens=min(asked, room)) for room in rooms],
        param=param,
        output=output_options(wanted, prepared),
        choices=choices,
        seed=wanted.seed,
        arrival=arrival,
    )
    generation = start_generation(service, request, asked_for)
    return GenerationResponse(service, generation, TrlWriter(generation, choices, params.logprobs), stream=False)


class TrlWriter:
    """Answers of ``/generate/`` and ``/chat/``, which are never streams."""

    def __init__(self, generation: Generation, choices: int, logprobs: int | None) -> None:
        self._generation, self._choices, self._logprobs = generation, choices, logprobs

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        raise NotImplementedError

    def end(self) -> bytes:
        raise NotImplementedError

    def body(self, answers: list[Piece]) -> bytes:
        found: dict[str, Any] = {
            "prompt_ids": [sequence.prompt for sequence in self._generation.sequences[:: self._choices]],
            "completion_ids": [answer.tokens for answer in answers],
            "logprobs": None,
            "logprob_token_ids": None,
        }
        if (top := self._logprobs) is not None:
            positions = [[ranked(entry, top) for entry in answer.logprobs] for answer in answers]
            found["logprobs"] = [[[entry[1] for entry in row] for row in answer] for answer in positions]
            found["logprob_token_ids"] = [[[entry[0] for entry in row] for row in answer] for answer in positions]
        return encode(found)


def ranked(entry: TokenLogprobs, top: int) -> list[tuple[int, float | None]]:
    """Tokens and their log-probabilities at a position, likeliest first: the ``top`` and the one that stands there."""
    found = dict(entry.top[:top])
    if entry.token not in found:  # it is less likely than these
        found[entry.token] = entry.logprob
    return [(token, None if math.isnan(logprob) else max(logprob, LOWEST)) for token, logprob in found.items()]


async def trl_score(service: Service, request: Request) -> GenerationResponse:
    arrival = time.monotonic()
    prepared: Prepared[TrlScoreBody] = await prepare_generation(service, request, "trl_score")
    body, sequences = prepared.body, prepared.prompts
    principal = principal_of(request.scope)
    require_choices(service, principal, 1, len(sequences))
    for sequence in sequences:
        fit_context(service, len(sequence), 0, "sequences")
    top = logprobs_asked(service, principal, body.top_logprobs, "top_logprobs")
    assert top is not None
    params = sampling_params(service, PLAIN, prepared, max_tokens=0, logprobs=None, prompt_logprobs=top)
    asked = GenerationRequest(
        prompts=sequences,
        params=[params] * len(sequences),
        param="sequences",
        output=OutputOptions(),
        arrival=arrival,
    )
    generation = start_generation(service, request, asked)
    writer = ScoreWriter(generation, body.prompt_lengths, top, body.response_format == "binary")
    return GenerationResponse(service, generation, writer, stream=False)


class ScoreWriter(TrlWriter):
    """Answers of ``/get_sequence_logprobs/``: of each position behind the prompts, the likeliest tokens."""

    def __init__(self, generation: Generation, prompt_lengths: list[int], top: int, binary: bool) -> None:
        super().__init__(generation, 1, top)
        self._prompt_lengths, self._top, self._binary = prompt_lengths, top, binary

    def body(self, answers: list[Piece]) -> bytes:
        rows = [
            sequence.prompt_logprobs[length:]
            for sequence, length in zip(self._generation.sequences, self._prompt_lengths, strict=True)
        ]
        return encode(self._packed(rows) if self._binary else self._lists(rows))

    def _lists(self, rows: list[list[TokenLogprobs | None]]) -> dict[str, Any]:
        found = [[[] if entry is None else ranked(entry, self._top) for entry in row] for row in rows]
        return {
            "logprobs": [[[logprob for _, logprob in entry] for entry in row] for row in found],
            "logprob_token_ids": [[[token for token, _ in entry] for entry in row] for row in found],
        }

    def _packed(self, rows: list[list[TokenLogprobs | None]]) -> dict[str, Any]:
        """Arrays [sequence, position, rank], filled up with minus infinity and token 0."""
        longest = max(map(len, rows))
        logprobs, tokens = array("f"), array("i")
        actual_logprobs, actual_tokens = array("f"), array("i")
        for row in rows:
            for entry in [*row, *[None] * (longest - len(row))]:
                best = [] if entry is None else ranked(entry, self._top)[: self._top]
                lacking = self._top - len(best)
                logprobs.extend([-math.inf if logprob is None else logprob for _, logprob in best])
                logprobs.extend([-math.inf] * lacking)
                tokens.extend([token for token, _ in best])
                tokens.extend([0] * lacking)
                known = entry is not None and not math.isnan(entry.logprob)
                actual_logprobs.append(entry.logprob if entry is not None and known else -math.inf)
                actual_tokens.append(0 if entry is None else entry.token)
        return {
            "logprobs_b64": b64encode(logprobs.tobytes()).decode(),
            "token_ids_b64": b64encode(tokens.tobytes()).decode(),
            "actual_logprobs_b64": b64encode(actual_logprobs.tobytes()).decode(),
            "actual_token_ids_b64": b64encode(actual_tokens.tobytes()).decode(),
            "shape": [len(rows), longest, self._top],
            "completion_lengths": [len(row) for row in rows],
        }
