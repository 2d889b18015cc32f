"""POST /v1/embeddings: what the model makes of texts, pooled over their positions."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from array import array
from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from slipstream.engine.messages import SamplingParams
from slipstream.server.access.deadline import LIMIT_S
from slipstream.server.access.principal import principal_of
from slipstream.server.errors import InvalidRequestError
from slipstream.server.generating import (
    GenerationRequest,
    fit_context,
    prepare_generation,
    require_choices,
    start_generation,
)
from slipstream.server.generation import OutputOptions, Sequence
from slipstream.server.openai.schema import EmbeddingsBody
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.responses import LargeResponse, cancelled_on_disconnect, require_whole
from slipstream.server.service import Service

encode = msgspec.json.Encoder().encode


async def embed(service: Service, request: Request) -> Response:
    arrival = time.monotonic()
    return await answer_embeddings(service, request, await prepare_generation(service, request, "embed"), arrival)


async def answer_embeddings(
    service: Service, request: Request, prepared: Prepared[EmbeddingsBody], arrival: float
) -> Response:
    """Raises what start_generation raises, and ClientDisconnect."""
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
        adapter=service.adapters.of(model),
        arrival=arrival,
    )
    generation = start_generation(service, request, asked)
    limit = request.scope.get(LIMIT_S)
    async with cancelled_on_disconnect(request.receive, arrival + limit if limit else None):
        with service.responding(), generation:
            await generation.collect()
            require_whole(generation.sequences)
            vectors = []
            for sequence in generation.sequences:
                vectors.append(encode(described(sequence, body)))
                await asyncio.sleep(0)  # others have their turn
        return LargeResponse(service, answer(model, vectors, sum(map(len, prompts))))
    raise ClientDisconnect


def described(sequence: Sequence, body: EmbeddingsBody) -> dict[str, Any]:
    """Raises InvalidRequestError if there are not so many dimensions."""
    found = array("f", sequence.embedding)
    if body.dimensions is not None:
        if body.dimensions > len(found):
            raise InvalidRequestError(
                f"dimensions: this model has {len(found)}, not {body.dimensions}", param="dimensions"
            )
        found = found[: body.dimensions]
    if body.normalize is not False:
        length = math.hypot(*found) or 1.0
        found = array("f", [number / length for number in found])
    told = base64.b64encode(found).decode() if body.encoding_format == "base64" else found.tolist()
    return {"object": "embedding", "index": sequence.index, "embedding": told}


def answer(model: str, vectors: list[bytes], num_tokens: int) -> bytes:
    about = encode(
        {"object": "list", "model": model, "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}
    )
    return b"".join((about[:-1], b',"data":[', b",".join(vectors), b"]}"))
