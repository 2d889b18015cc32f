"""POST /tokenize and /detokenize"""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic_core import from_json

from slipstream.server.body import parse, read_body
from slipstream.server.errors import InvalidRequestError
from slipstream.server.openai.chat import render_prompt, template_for
from slipstream.server.openai.request import read
from slipstream.server.openai.schema import DetokenizeBody, TokenizeMessagesBody, TokenizeTextBody
from slipstream.server.service import Service


async def tokenize(service: Service, request: Request) -> dict[str, Any]:
    service.require_ready()
    config = service.config
    raw = await read_body(request, config.max_body_bytes)
    if has_messages(raw):
        conversation = parse(TokenizeMessagesBody, raw, config.unknown_fields)
        service.require_model(conversation.model)
        tokens = await render_prompt(service, conversation, await template_for(service, conversation))
        with_texts = conversation.return_token_strs
    else:
        text = parse(TokenizeTextBody, raw, config.unknown_fields)
        service.require_model(text.model)
        [tokens] = await service.text.encode([text.prompt], text.add_special_tokens is not False)
        with_texts = text.return_token_strs
    return {
        "count": len(tokens),
        "max_model_len": service.engine.ready.max_model_len,
        "tokens": tokens,
        "token_strs": [service.text.tokenizer.token_text(token) for token in tokens] if with_texts else None,
    }


def has_messages(raw: bytes) -> bool:
    try:
        data = from_json(raw)
    except ValueError:
        return False
    return isinstance(data, dict) and "messages" in data


async def detokenize(service: Service, request: Request) -> dict[str, Any]:
    body = await read(service, request, DetokenizeBody)
    service.require_model(body.model)
    tokenizer = service.text.tokenizer
    # What /tokenize gives can be more than the model has, and ids that the model has can be without text.
    known = max(service.engine.ready.vocab_size, tokenizer.vocab_size)
    if (largest := max(body.tokens, default=0)) >= known:
        raise InvalidRequestError(f"tokens: there are the tokens 0 to {known - 1}, not {largest}", param="tokens")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}
