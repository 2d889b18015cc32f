"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request

from slipstream.server.errors import InvalidRequestError
from slipstream.server.openai.logprobs import LogprobFormatter
from slipstream.server.openai.request import answer_options, encode, make_generation, read, require_choices
from slipstream.server.openai.sampling import fit_context, logprobs_asked, sampling_params
from slipstream.server.openai.schema import ChatBody, Message, TemplateBody
from slipstream.server.openai.writers import ChatWriter
from slipstream.server.responses import GenerationResponse
from slipstream.server.service import Service
from slipstream.server.text import RESERVED_VARIABLES, ChatTemplate, TemplateError

TEMPLATE_FIELDS = {"role", "content", "name", "tool_call_id", "reasoning_content"}


async def chat(service: Service, request: Request) -> GenerationResponse:
    arrival = time.monotonic()
    body = await read(service, request, ChatBody)
    model = service.require_model(body.model)
    require_choices(service, body)

    template = await template_for(service, body)
    prompt = await render_prompt(service, body, template)
    ends = await service.text.turn_ends_of(template)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    room = fit_context(service, len(prompt), asked, "messages")
    logprobs = logprobs_asked(service, body.top_logprobs or 0, "top_logprobs") if body.logprobs else None
    prompt_logprobs = logprobs_asked(service, body.prompt_logprobs, "prompt_logprobs")
    params = sampling_params(
        service, body, max_tokens=asked or room, logprobs=logprobs, prompt_logprobs=prompt_logprobs, ends=ends
    )
    generation = make_generation(
        service,
        request,
        body,
        prefix="chatcmpl-",
        param="messages",
        prompts=[prompt],
        params=[params],
        arrival=arrival,
        ends=ends,
    )
    options = answer_options(body, model, int(time.time()), logprobs, prompt_logprobs)
    formatter = LogprobFormatter(service.text.tokenizer, bool(body.return_tokens_as_token_ids))
    return GenerationResponse(service, generation, ChatWriter(generation, options, formatter), bool(body.stream))


async def template_for(service: Service, body: TemplateBody) -> ChatTemplate:
    """The request's own or the model's; raises InvalidRequestError if it is broken, or there is none."""
    text = service.text
    template = text.template
    if body.chat_template is not None:
        if not service.config.trust_request_chat_template:
            raise InvalidRequestError(
                "chat_template is only accepted with --trust-request-chat-template", param="chat_template"
            )
        try:
            template = await text.compile(body.chat_template)
        except TemplateError as error:
            raise InvalidRequestError(str(error), param="chat_template") from None
    if template is None:
        raise InvalidRequestError(
            "the model has no chat template; start the server with --chat-template or use /v1/completions",
            param="messages",
        )
    return template


async def render_prompt(service: Service, body: TemplateBody, template: ChatTemplate) -> list[int]:
    """The token ids of a conversation.

    Raises:
        InvalidRequestError: the template refuses it, or is broken.
    """
    variables = body.chat_template_kwargs or {}
    if reserved := RESERVED_VARIABLES & variables.keys():
        name = min(reserved)
        raise InvalidRequestError(f"{name!r} cannot be set here", param=f"chat_template_kwargs.{name}")
    continued = bool(body.continue_final_message)
    try:
        prompt = await service.text.render(
            template,
            [as_template_sees_it(message) for message in body.messages],
            add_generation_prompt=not continued if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=continued,
            variables=variables,
        )
    except TemplateError as error:
        raise InvalidRequestError(str(error), param="messages") from None
    return (await encode(service, [prompt], bool(body.add_special_tokens), "messages"))[0]


def as_template_sees_it(message: Message) -> dict[str, Any]:
    fields = message.model_dump(include=TEMPLATE_FIELDS, exclude_none=True)
    # Templates join contents to other text; an assistant that said nothing said the empty text.
    fields.setdefault("content", "")
    if message.role == "developer":  # newer name of the same thing; templates know the old one
        fields["role"] = "system"
    return fields
