"""From the bytes of bodies of this dialect to token ids. It rests on openai/prepare.py; see server/jobs.py."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Literal

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import parse
from slipstream.server.openai import prepare as openai
from slipstream.server.openai.prepare import (
    STRUCTURED,
    answer,
    encode,
    require_fits,
    structure,
    template_for,
)
from slipstream.server.openai.schema import ChatBody, SamplingBody, TemplateBody
from slipstream.server.openai.structured import StructuredFields
from slipstream.server.openai.truncated import TruncationFields, shortened
from slipstream.server.preparing.prepared import Answered, Limits, Prepared
from slipstream.server.preparing.text_model import TextModel
from slipstream.server.vllm.schema import (
    TokensInBody,
    TrlChatBody,
    TrlGenerateBody,
    TrlSampling,
    TrlScoreBody,
    VllmRenderBody,
    VllmSampling,
)

UNKNOWN: Literal["warn"] = "warn"
"""What becomes of unknown fields, whatever --unknown-fields says: the servers that clients know ignore them."""


def tokens_in(text: TextModel, limits: Limits, raw: bytes) -> Prepared[TokensInBody]:
    """Raises InvalidRequestError."""
    body = parse(TokensInBody, raw, UNKNOWN)
    sampling = body.sampling_params
    [prompt] = shortened(text, limits, [body.token_ids], sampling, sampling.max_tokens, from_texts=False)
    require_fits(limits, len(prompt), "token_ids")
    done = body.model_copy(update={"token_ids": [], "sampling_params": sampling.model_copy(update=STRUCTURED)})
    return Prepared(done, [prompt], [], structure=structure(text, limits, sampling))


def render(text: TextModel, limits: Limits, raw: bytes) -> Answered:
    """A body for ``/inference/v1/generate``. Raises InvalidRequestError, RunElsewhereError."""
    body = parse(VllmRenderBody, raw, UNKNOWN)
    told = openai.with_thinking(limits, body, template_for(text, limits, body))
    prompt = prompt_of(text, limits, told, body, body.answer_tokens)
    return answer(
        body.model,
        {
            "request_id": body.request_id or f"chatcmpl-{uuid.uuid4().hex}",
            "token_ids": prompt,
            "token_offsets": None,
            "features": None,
            "content_parts": None,
            "sampling_params": sampling_of(body),
            "model": limits.model_names[0] if body.model is None else body.model,
            "reasoning_ended": None,
            "reasoning_parser_kwargs": None,
            "return_token_ids": body.return_token_ids,
            "output_mode": "tokens",
            "stream": bool(body.stream),
            "stream_options": None if body.stream_options is None else body.stream_options.model_dump(),
            "cache_salt": body.cache_salt,
            "priority": body.priority or 0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
        },
    )


def prompt_of(
    text: TextModel, limits: Limits, body: TemplateBody, asked: TruncationFields, answer: int | None
) -> list[int]:
    """The token ids of a conversation; ``asked`` and ``answer`` are those of ``shortened``.

    Raises InvalidRequestError, RunElsewhereError.
    """
    rendered = openai.render(limits, body, template_for(text, limits, body))
    prompts = encode(text, limits, [rendered], bool(body.add_special_tokens), "messages")
    [prompt] = shortened(text, limits, prompts, asked, answer)
    require_fits(limits, len(prompt), "messages")
    return prompt


def sampling_of(body: ChatBody) -> dict[str, Any]:
    """The sampling parameters that a conversation asks for, as ``/inference/v1/generate`` takes them."""
    fields = {*SamplingBody.model_fields, *StructuredFields.model_fields}
    found = body.model_dump(include=fields, exclude_none=True, by_alias=True)
    if body.max_completion_tokens is not None:
        found["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        found["logprobs"] = body.top_logprobs or 0
    return found


def trl_generate(text: TextModel, limits: Limits, raw: bytes) -> Prepared[VllmSampling]:
    """Raises InvalidRequestError."""
    body = parse(TrlGenerateBody, raw, UNKNOWN)
    require_few(limits, len(body.prompts), "prompts")
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    prompts = [prompt for prompt in body.prompts if isinstance(prompt, list)]
    if texts:
        prompts = encode(text, limits, texts, True, "prompts")
    wanted = body.resolved
    prompts = shortened(text, limits, prompts, wanted, wanted.max_tokens, from_texts=bool(texts))
    for prompt in prompts:
        require_fits(limits, len(prompt), "prompts")
    return Prepared(resolved(body), prompts, [], structure=structure(text, limits, wanted))


def trl_chat(text: TextModel, limits: Limits, raw: bytes) -> Prepared[VllmSampling]:
    """Raises InvalidRequestError."""
    body = parse(TrlChatBody, raw, UNKNOWN)
    require_few(limits, len(body.messages), "messages")
    about: dict[str, Any] = {
        "chat_template_kwargs": body.chat_template_kwargs,
        "tools": body.tools,
        "tool_choice": "none",
    }
    wanted = body.resolved
    bodies = [TemplateBody(messages=messages, **about) for messages in body.messages]
    prompts = [prompt_of(text, limits, each, wanted, wanted.max_tokens) for each in bodies]
    return Prepared(resolved(body), prompts, [], text.turn_ends, structure(text, limits, wanted))


def resolved(body: TrlSampling) -> VllmSampling:
    """Without what nobody asks for once there are prompts and a grammar."""
    return body.resolved.model_copy(update=STRUCTURED)


def trl_score(text: TextModel, limits: Limits, raw: bytes) -> Prepared[TrlScoreBody]:
    """Raises InvalidRequestError."""
    body = parse(TrlScoreBody, raw, UNKNOWN)
    require_few(limits, len(body.sequences), "sequences")
    for sequence in body.sequences:
        require_fits(limits, len(sequence), "sequences")
    return Prepared(body.model_copy(update={"sequences": []}), body.sequences, [])


def require_few(limits: Limits, count: int, param: str) -> None:
    """Raises InvalidRequestError."""
    if count > limits.max_prompts:
        raise InvalidRequestError(f"{param}: at most {limits.max_prompts} (--max-prompts), not {count}", param=param)


JOBS: dict[str, Callable[[TextModel, Limits, bytes], Any]] = {
    job.__name__: job for job in (tokens_in, render, trl_generate, trl_chat, trl_score)
}
