"""POST /generate"""

from __future__ import annotations

import time

from fastapi import Request

from slipstream.server.access.consent import LEVEL_KEY
from slipstream.server.access.principal import principal_of
from slipstream.server.generating import GenerationRequest, prepare_generation, start_generation
from slipstream.server.preparing.prepared import Prepared
from slipstream.server.responses import GenerationResponse
from slipstream.server.service import Service
from slipstream.server.sglang.asked import read_asked
from slipstream.server.sglang.schema import SGLangGenerateBody
from slipstream.server.sglang.writer import SGLangWriter, WriterOptions


async def generate(service: Service, request: Request) -> GenerationResponse:
    arrival = time.monotonic()
    prepared: Prepared[SGLangGenerateBody] = await prepare_generation(service, request, "sglang_generate")
    body, prompts = prepared.body, prepared.prompts
    principal = principal_of(request.scope)
    asked = read_asked(service, principal, prepared, request.state.request_id)
    choices = len(asked[0].ids)
    generation = start_generation(
        service,
        request,
        *(
            GenerationRequest(
                prompts=[prompt],
                params=[each.params],
                param="input_ids",
                output=each.output,
                choices=choices,
                seed=each.seed,
                # There a higher number is more urgent.
                priority=-(body.priority or 0),
                cache_salt=each.cache_salt,
                metadata={LEVEL_KEY: "off"} if body.no_logs else {},
                sequence_ids=each.ids,
                adapter=each.adapter,
                arrival=arrival,
            )
            for prompt, each in zip(prompts, asked, strict=True)
        ),
    )
    options = WriterOptions(
        many=not body.is_single or choices > 1,
        cumulative=not body.incremental_streaming_output,
        with_text=bool(body.return_text_in_logprobs),
        with_prompt=bool(body.return_prompt_token_ids),
    )
    writer = SGLangWriter(service, generation, [each for each in asked for _ in range(choices)], options)
    return GenerationResponse(service, generation, writer, bool(body.stream))
