"""The generating routes of vLLM's dialect. What controls the server is in control.py, areal.py and trl_control.py."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from slipstream.server.generating import answer_without_engine
from slipstream.server.http.body import Body
from slipstream.server.http.description import BUSY, describe
from slipstream.server.http.json_response import JSONBody
from slipstream.server.service import Service
from slipstream.server.vllm import answers
from slipstream.server.vllm.asked import body_of
from slipstream.server.vllm.generate import generate_tokens
from slipstream.server.vllm.schema import (
    NoBody,
    TokensInBody,
    TrlChatBody,
    TrlGenerateBody,
    TrlScoreBody,
    VllmRenderBody,
)
from slipstream.server.vllm.trl import trl_chat, trl_generate, trl_score

BODIES: tuple[type[Body], ...] = (TokensInBody, TrlGenerateBody, TrlChatBody, TrlScoreBody, VllmRenderBody, NoBody)
DESCRIBED = (*BODIES, *answers.ANSWERS)


def vllm_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    @router.post(
        "/inference/v1/generate",
        openapi_extra=describe(answers.TokensOutAnswer, *BUSY, bodies=[TokensInBody], stream=answers.TokensOutChunk),
    )
    async def generate(request: Request) -> Response:
        """Continue token ids."""
        return await generate_tokens(service, request)

    @router.post(
        "/v1/chat/completions/render", openapi_extra=describe(answers.Rendered, *BUSY, bodies=[VllmRenderBody])
    )
    async def render(request: Request) -> Response:
        """The token ids of a conversation, as a body for /inference/v1/generate."""
        return await answer_without_engine(service, request, "render")

    @router.post("/generate/", openapi_extra=describe(answers.TrlCompletions, *BUSY, bodies=[TrlGenerateBody]))
    async def generate_for_trl(request: Request) -> Response:
        """Continue several prompts."""
        return await trl_generate(service, request)

    @router.post("/chat/", openapi_extra=describe(answers.TrlCompletions, *BUSY, bodies=[TrlChatBody]))
    async def chat_for_trl(request: Request) -> Response:
        """Continue several conversations."""
        return await trl_chat(service, request)

    @router.post("/get_sequence_logprobs/", openapi_extra=describe(answers.TrlScores, *BUSY, bodies=[TrlScoreBody]))
    async def scores_for_trl(request: Request) -> Response:
        """How likely tokens are that others have said."""
        return await trl_score(service, request)

    @router.post("/finish_session", openapi_extra=describe(answers.SessionFinished, 503, bodies=[NoBody]))
    async def finish_session(request: Request) -> Response:
        """A conversation is over; nothing is held for it here."""
        service.require_ready()
        await body_of(service, request, NoBody)
        return JSONBody({"status": "ok"})

    @router.get("/load", openapi_extra=describe(answers.ServerLoad, 503))
    async def load() -> Response:
        """How many requests are waiting or computed, as routers ask."""
        service.require_ready()
        return JSONBody({"server_load": service.engine.num_open})

    @router.get("/health/", openapi_extra=describe(answers.TrlHealth, 503, errors=answers.TrlHealth))
    async def health_for_trl() -> Response:
        """200 while the engine makes progress."""
        status, body = service.health()
        return JSONBody(body, status)

    @router.get("/liveness", openapi_extra=describe(answers.TrlHealth, 503, errors=answers.TrlHealth))
    async def liveness() -> Response:
        """The same, as prime-rl asks."""
        status, body = service.health()
        return JSONBody(body if status == 200 else body | {"status": "engine_unresponsive"}, status)

    return router
