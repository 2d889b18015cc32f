"""The routes of the OpenAI dialect."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response

from slipstream.server.access.principal import principal_of
from slipstream.server.generating import prepare
from slipstream.server.http.body import Body
from slipstream.server.http.description import BUSY, describe
from slipstream.server.http.json_response import JSONBody
from slipstream.server.openai import answers
from slipstream.server.openai.chat import chat
from slipstream.server.openai.completions import complete
from slipstream.server.openai.embeddings import embed
from slipstream.server.openai.invocations import invoke
from slipstream.server.openai.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    PruneRolloutsBody,
    TokenizeMessagesBody,
    TokenizeTextBody,
)
from slipstream.server.openai.tokens import detokenize, tokenize, told_of_tokenizer
from slipstream.server.responses import LargeResponse
from slipstream.server.service import Service

BODIES: tuple[type[Body], ...] = (
    ChatBody,
    CompletionBody,
    EmbeddingsBody,
    TokenizeTextBody,
    TokenizeMessagesBody,
    DetokenizeBody,
    PruneRolloutsBody,
)
DESCRIBED = (*BODIES, *answers.ANSWERS)


def openai_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    @router.post(
        "/v1/chat/completions",
        openapi_extra=describe(answers.ChatAnswer, *BUSY, bodies=[ChatBody], stream=answers.ChatChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """Continue a conversation."""
        return await chat(service, request)

    @router.post(
        "/v1/completions",
        openapi_extra=describe(
            answers.CompletionAnswer, *BUSY, bodies=[CompletionBody], stream=answers.CompletionChunk
        ),
    )
    async def completions(request: Request) -> Response:
        """Continue one text or several."""
        return await complete(service, request)

    @router.get("/v1/models", openapi_extra=describe(answers.Models, 503))
    async def models() -> Response:
        """The model of this server under its names, and the LoRAs beside it."""
        service.require_ready()
        names = service.adapters.names
        page = {"first_id": names[0], "last_id": names[-1], "has_more": False}
        return JSONBody({"object": "list", "data": [model_card(service, name) for name in names], **page})

    @router.get("/v1/models/{name:path}", openapi_extra=describe(answers.Model, 404, 503))
    async def model(name: str) -> Response:
        """One name of the model, or a LoRA."""
        service.require_ready()
        return JSONBody(model_card(service, service.require_model(name)))

    told = describe(answers.Tokens, *BUSY, bodies=[TokenizeTextBody, TokenizeMessagesBody])

    @router.post("/tokenize", openapi_extra=told)
    @router.post("/v1/tokenize", openapi_extra=told)
    async def tokens_of(request: Request) -> Response:
        """The tokens of texts or of a conversation."""
        return await tokenize(service, request)

    told = describe(answers.Text, *BUSY, bodies=[DetokenizeBody])

    @router.post("/detokenize", openapi_extra=told)
    @router.post("/v1/detokenize", openapi_extra=told)
    async def text_of(request: Request) -> Response:
        """The text of tokens."""
        return await detokenize(service, request)

    @router.post("/v1/embeddings", openapi_extra=describe(answers.Embeddings, *BUSY, bodies=[EmbeddingsBody]))
    async def embeddings(request: Request) -> Response:
        """What the model makes of texts, as vectors."""
        return await embed(service, request)

    @router.post(
        "/invocations",
        openapi_extra=describe(
            answers.Invoked,
            *BUSY,
            bodies=[ChatBody, CompletionBody, EmbeddingsBody],
            stream=answers.InvokedChunk,
        ),
    )
    async def invocations(request: Request) -> Response:
        """A chat, a completion or embeddings, as the body says."""
        return await invoke(service, request)

    @router.get("/tokenizer_info", openapi_extra=describe(answers.TokenizerInfo, 503))
    async def tokenizer_info() -> Response:
        """The special tokens and the chat template, for who renders conversations by himself."""
        service.require_ready()
        return LargeResponse(service, told_of_tokenizer(service))

    @router.post("/v1/rollouts/prune", openapi_extra=describe(answers.PrunedRollouts, 503, bodies=[PruneRolloutsBody]))
    async def prune(request: Request) -> Response:
        """Abort all but the best samples of a group, by the scores that they have got so far."""
        body = await prepare(service, request, "prune_rollouts")
        name = principal_of(request.scope).tenant(body.user or ""), body.group
        return JSONBody({"pruned": service.control.groups.prune(name, body.scores, body.keep)})

    return router


def model_card(service: Service, name: str) -> dict[str, Any]:
    """``root`` of a LoRA is its name, for its folder is nobody's business who only uses it."""
    adapter = service.adapters.of(name)
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "slipstream",
        "root": adapter or service.model_names[0],
        "parent": service.model_names[0] if adapter else None,
        "max_model_len": service.engine.ready.max_model_len,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
    }
