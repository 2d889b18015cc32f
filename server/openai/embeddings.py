"""POST /v1/embeddings: what the model makes of texts, pooled over their positions."""

from __future__ import annotations

import base64
import time
from typing import Any

import msgspec
import numpy as np
from fastapi import Request

from slipstream.engine.messages import SamplingParams
from slipstream.server.errors import InvalidRequestError
from slipstream.server.generating import (
    GenerationRequest,
    fit_context,
    prepare_generation,
    require_choices,
    start_generation,
)
from slipstream.server.generation import Generation, OutputOptions, Piece, Sequence
from slipstream.server.openai.schema import EmbeddingsBody
from slipstream.server.prepared import Prepared
from slipstream.server.principal import principal_of
from slipstream.server.responses import GenerationResponse
from slipstream.server.service import Service

encode = msgspec.json.Encoder().encode


async def embed(service: Service, request: Request) -> GenerationResponse:
    arrival = time.monotonic()
    prepared: Prepared[EmbeddingsBody] = await prepare_generation(service, request, "embed")
    body, prompts = prepared.body, prepared.prompts
    model = service.require_model(body.model)
    require_choices(service, principal_of(request.scope), 1, len(prompts))
    for prompt in prompts:
        fit_context(service, len(prompt), 0, "input")
    asked = GenerationRequest(
        prompts=prompts,
        params=[SamplingParams(max_tokens=0, temperature=0.0, pooling=body.pooling or "mean")] * len(prompts),
        param="input",
        output=OutputOptions(),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        user=body.user,
        metadata=body.metadata or {},
        answer_prefix="embd-",
        request_id=body.request_id,
        arrival=arrival,
    )
    generation = start_generation(service, request, asked)
    return GenerationResponse(service, generation, EmbeddingWriter(generation, body, model), stream=False)


class EmbeddingWriter:
    def __init__(self, generation: Generation, body: EmbeddingsBody, model: str) -> None:
        self._generation, self._body, self._model = generation, body, model

    def chunk(self, sequence: Sequence, piece: Piece) -> bytes:
        raise NotImplementedError("embeddings do not stream")

    def end(self) -> bytes:
        raise NotImplementedError("embeddings do not stream")

    def body(self, answers: list[Piece]) -> bytes:
        count = sum(len(sequence.prompt) for sequence in self._generation.sequences)
        return encode(
            {
                "object": "list",
                "model": self._model,
                "data": [
                    {"object": "embedding", "index": sequence.index, "embedding": self._embedding(sequence)}
                    for sequence in self._generation.sequences
                ],
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )

    def _embedding(self, sequence: Sequence) -> Any:
        found = np.frombuffer(sequence.embedding, np.float32)
        if self._body.dimensions is not None:
            if self._body.dimensions > len(found):
                raise InvalidRequestError(
                    f"dimensions: this model has {len(found)}, not {self._body.dimensions}", param="dimensions"
                )
            found = found[: self._body.dimensions]
        if self._body.normalize is not False:
            found = found / max(float(np.linalg.norm(found)), 1e-12)
        if self._body.encoding_format == "base64":
            return base64.b64encode(found.astype("<f4").tobytes()).decode()
        return found.tolist()
