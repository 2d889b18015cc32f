"""POST /tokenize and /detokenize, GET /tokenizer_info"""

from __future__ import annotations

import msgspec
from fastapi import Request, Response

from slipstream.server.generating import answer_without_engine
from slipstream.server.service import Service

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
encode = msgspec.json.Encoder().encode


async def tokenize(service: Service, request: Request) -> Response:
    return await answer_without_engine(service, request, "tokenize")


def told_of_tokenizer(service: Service) -> bytes:
    """The answer of /tokenizer_info."""
    text = service.text
    special = {name: value for name, value in text.tokenizer.special_tokens.items() if name in SPECIAL}
    template = None if text.template is None else text.template.default
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": service.engine.ready.max_model_len}
    return encode(dict.fromkeys(SPECIAL) | special | about | {"chat_template": template})


async def detokenize(service: Service, request: Request) -> Response:
    return await answer_without_engine(service, request, "detokenize")
