"""From the bytes of a body to what the engine needs: parsed, rendered and tokenized.

These are functions of a body alone, so that server/preparing/text_work.py can choose where they run: on the event
loop, in a thread, or in a process of their own. Nothing here imports more than such a process needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
from pydantic_core import from_json

from slipstream.server.errors import ContextTooLongError, InvalidRequestError
from slipstream.server.http.body import parse, shown
from slipstream.server.openai.billing import part_without_header, without_header
from slipstream.server.openai.message import ROLES, Message
from slipstream.server.openai.schema import (
    MAX_STOP_CHARS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    Prompt,
    PruneRolloutsBody,
    TemplateBody,
    TokenizeMessagesBody,
    TokenizeTextBody,
)
from slipstream.server.openai.structured import StructuredFields
from slipstream.server.openai.thinking import thinking_variables
from slipstream.server.openai.tools import ToolFields, plan_answer, tool_format, tool_use
from slipstream.server.openai.truncated import shortened
from slipstream.server.preparing.prepared import Answered, Limits, Prepared, RunElsewhereError, Structure
from slipstream.server.preparing.text_model import TextModel
from slipstream.server.preparing.vetting import is_known, vet
from slipstream.server.text import RESERVED_VARIABLES, ChatTemplate, TemplateError, TurnEnds
from slipstream.server.tools.formats import FORMATS
from slipstream.server.tools.prompt import told_of_tools, with_results_told, without_calls

TEMPLATE_FIELDS = {"role", "content", "name", "tool_call_id", "reasoning_content", "reasoning"}
SAME_ROLES = {"developer": "system", "function": "tool"}
"""Roles that templates know by another name: a newer one, and the first one of what tools gave back."""
STRUCTURED: dict[str, Any] = dict.fromkeys(StructuredFields.model_fields)
"""What nobody asks for once there is a grammar."""
RENDERED: dict[str, Any] = {
    "messages": [],
    **dict.fromkeys(ToolFields.model_fields),
    "chat_template": None,
    "chat_template_kwargs": None,
    "documents": None,
    **STRUCTURED,
}
"""What nobody asks for once there is a prompt."""
MAX_ANSWER_BYTES = 16 * 2**20
"""Most bytes of an answer of /tokenize and /detokenize."""

encode_json = msgspec.json.Encoder().encode


def chat(text: TextModel, limits: Limits, raw: bytes) -> Prepared[ChatBody]:
    """Raises InvalidRequestError, RunElsewhereError."""
    prepared = conversation(text, limits, parse(ChatBody, raw, limits.unknown_fields))
    require_fits(limits, len(prepared.prompts[0]), "messages")
    return prepared


def conversation(text: TextModel, limits: Limits, body: ChatBody) -> Prepared[ChatBody]:
    """Its prompt may be longer than the context. Raises InvalidRequestError, RunElsewhereError."""
    template = template_for(text, limits, body)
    rendered = render(limits, with_thinking(limits, body, template), template)
    prompts = encode(text, limits, [rendered], bool(body.add_special_tokens), "messages")
    prompts = shortened(text, limits, prompts, body, body.answer_tokens)
    ends = text.turn_ends if template is text.template else short(text.tokenizer.turn_ends(template))
    asked, use = structure_asked(body), tool_use(body)
    said = body.messages[-1].text if body.continue_final_message else ""
    calls = sum(len(message.calls) for message in body.messages)
    speech, found = plan_answer(limits, text.tokenizer, template.text, rendered, use, asked, said, calls)
    require_alone(body, found)
    done = body.model_copy(update=RENDERED)
    return Prepared(done, prompts, [], ends, tried(text, limits, found), speech)


def with_thinking(limits: Limits, body: ChatBody, template: ChatTemplate) -> ChatBody:
    """With what the template is to be told of it; what the body tells the template itself counts more."""
    variables = thinking_variables(limits, body, template.text)
    return body.model_copy(update={"chat_template_kwargs": variables | (body.chat_template_kwargs or {})})


def complete(text: TextModel, limits: Limits, raw: bytes) -> Prepared[CompletionBody]:
    """Raises InvalidRequestError."""
    body = parse(CompletionBody, raw, limits.unknown_fields)
    texts, prompts = split_prompt(body.prompt)
    count = len(texts or prompts)
    if count > limits.max_prompts:
        raise InvalidRequestError(
            f"prompt: at most {limits.max_prompts} prompts (--max-prompts), not {count}", param="prompt"
        )
    if texts:
        prompts = encode(text, limits, texts, body.add_special_tokens is not False, "prompt")
    whole, prompts = prompts, shortened(text, limits, prompts, body, body.max_tokens, from_texts=bool(texts))
    texts = texts if prompts == whole else []
    for prompt in prompts:
        require_fits(limits, len(prompt), "prompt")
    done = body.model_copy(update={"prompt": ""} | STRUCTURED)
    return Prepared(done, prompts, texts if body.echo else [], structure=structure(text, limits, body))


def embed(text: TextModel, limits: Limits, raw: bytes) -> Prepared[EmbeddingsBody]:
    """Raises InvalidRequestError."""
    body = parse(EmbeddingsBody, raw, limits.unknown_fields)
    texts, prompts = split_prompt(body.input)
    if (count := len(texts or prompts)) > limits.max_prompts:
        raise InvalidRequestError(f"input: at most {limits.max_prompts} (--max-prompts), not {count}", param="input")
    if texts:
        prompts = encode(text, limits, texts, body.add_special_tokens is not False, "input")
    prompts = shortened(text, limits, prompts, body, answer=0, from_texts=bool(texts))
    for prompt in prompts:
        require_fits(limits, len(prompt), "input")
    return Prepared(body.model_copy(update={"input": ""}), prompts, [])


def tokenize(text: TextModel, limits: Limits, raw: bytes) -> Answered:
    """Raises InvalidRequestError, RunElsewhereError."""
    body: TokenizeMessagesBody | TokenizeTextBody
    if "messages" in fields_of(raw):
        body = parse(TokenizeMessagesBody, raw, limits.unknown_fields)
        texts: list[str] | str = render(limits, body, template_for(text, limits, body))
        special, param = bool(body.add_special_tokens), "messages"
    else:
        body = parse(TokenizeTextBody, raw, limits.unknown_fields)
        texts, special, param = body.prompt, body.add_special_tokens is not False, "prompt"
    single = isinstance(texts, str)
    found = encode(text, limits, [texts] if isinstance(texts, str) else texts, special, param)
    strs = [list(map(text.tokenizer.token_text, tokens)) for tokens in found] if body.return_token_strs else None
    return answer(
        body.model,
        {
            "count": len(found[0]) if single else list(map(len, found)),
            "max_model_len": limits.max_model_len,
            "tokens": found[0] if single else found,
            "token_strs": strs[0] if strs and single else strs,
        },
    )


def fields_of(raw: bytes) -> dict[str, Any]:
    """What a body has; nothing, if it is no JSON object, which whoever parses it says."""
    try:
        data = from_json(raw)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def detokenize(text: TextModel, limits: Limits, raw: bytes) -> Answered:
    """Raises InvalidRequestError."""
    body = parse(DetokenizeBody, raw, limits.unknown_fields)
    lists = [each for each in body.tokens if isinstance(each, list)]
    single = not lists
    if single:
        lists = [[each for each in body.tokens if isinstance(each, int)]]
    # What /tokenize gives can be more than the model has, and ids that the model has can be without text.
    known = max(limits.vocab_size, text.tokenizer.vocab_size)
    if (largest := max(map(max, filter(None, lists)), default=0)) >= known:
        raise InvalidRequestError(f"tokens: there are the tokens 0 to {known - 1}, not {largest}", param="tokens")
    texts = [text.tokenizer.decode(tokens, bool(body.skip_special_tokens)) for tokens in lists]
    said = texts[0] if single else texts
    return answer(body.model, {"prompt": said, "text": said})


def invoke(text: TextModel, limits: Limits, raw: bytes) -> Prepared[Any]:
    """What a body asks for that does not say so by its path. Raises InvalidRequestError, RunElsewhereError."""
    fields = fields_of(raw)
    for field, job in (("prompt", complete), ("input", embed)):
        if field in fields and "messages" not in fields:
            return job(text, limits, raw)
    return chat(text, limits, raw)


def prune_rollouts(text: TextModel, limits: Limits, raw: bytes) -> PruneRolloutsBody:
    """Raises InvalidRequestError."""
    return parse(PruneRolloutsBody, raw, limits.unknown_fields)


JOBS: dict[str, Callable[[TextModel, Limits, bytes], Any]] = {
    job.__name__: job for job in (chat, complete, embed, invoke, tokenize, detokenize, prune_rollouts)
}


def answer(model: str | None, content: Any) -> Answered:
    """``model`` as the request calls it."""
    data = encode_json(content)
    if len(data) > MAX_ANSWER_BYTES:
        raise InvalidRequestError(f"the answer would have {len(data)} bytes; at most {MAX_ANSWER_BYTES} are sent")
    return Answered(model, data)


def template_for(text: TextModel, limits: Limits, body: TemplateBody) -> ChatTemplate:
    """The request's own or the model's.

    Raises:
        InvalidRequestError: it is broken, or there is none.
        RunElsewhereError: the request brings a template, which may run elsewhere only.
    """
    template = text.template
    if body.chat_template is not None:
        if limits.request_templates == "refused":
            raise InvalidRequestError(
                "chat_template is only accepted with --trust-request-chat-template", param="chat_template"
            )
        if limits.request_templates == "elsewhere":
            raise RunElsewhereError
        try:
            template = ChatTemplate(body.chat_template, text.tokenizer.special_tokens).check()
        except TemplateError as error:
            raise InvalidRequestError(str(error), param="chat_template") from None
    if template is None:
        raise InvalidRequestError(
            "the model has no chat template; start the server with --chat-template or use /v1/completions",
            param="messages",
        )
    return template


def render(limits: Limits, body: TemplateBody, template: ChatTemplate) -> str:
    """The text of a conversation.

    Raises:
        InvalidRequestError: the template refuses it, or is broken.
    """
    variables = body.chat_template_kwargs or {}
    if reserved := RESERVED_VARIABLES & variables.keys():
        name = min(reserved)
        raise InvalidRequestError(f"{name!r} cannot be set here", param=f"chat_template_kwargs.{name}")
    require_known_roles(body.messages, template)
    if body.documents and "documents" not in template.text:
        raise InvalidRequestError(
            "documents: the chat template of this model knows of none; write them into a message",
            param="documents",
            code="unsupported_parameter",
        )
    continued = bool(body.continue_final_message)
    messages, tools = [as_template_sees_it(message) for message in body.messages], body.offered or None
    form = tool_format(limits, template.text) or FORMATS["json"]
    if "tool_calls" not in template.text:
        messages = messages if template.shows_results else with_results_told(messages)
        messages = without_calls(messages, form)
    if tools and not template.shows_tools:
        if body.choice != "none":
            messages = told_of_tools(messages, tools, form, "system" if template.shows_system else "user")
        tools = None
    try:
        return template.render(
            messages,
            tools=tools,
            documents=body.documents or None,
            add_generation_prompt=not continued if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=continued,
            variables=variables,
        )
    except TemplateError as error:
        raise InvalidRequestError(str(error), param="messages") from None


def require_known_roles(messages: list[Message], template: ChatTemplate) -> None:
    """Raises InvalidRequestError."""
    known = {*ROLES}
    for index, role in enumerate(message.role for message in messages):
        if role not in known and not re.search(rf"""(['"]){re.escape(role)}\1""", template.text):
            raise InvalidRequestError(
                f"messages.{index}.role: {', '.join(ROLES)}, or one that the chat template names, not {shown(role)}",
                param=f"messages.{index}.role",
            )
        known.add(role)


def structure(text: TextModel, limits: Limits, body: StructuredFields) -> Structure | None:
    """What the answer is to look like.

    Raises:
        InvalidRequestError: it cannot be combined with the rest of the request, or takes too much.
        RunElsewhereError: that has to be found out elsewhere.
    """
    asked = structure_asked(body)
    require_alone(body, asked)
    return tried(text, limits, asked)


def structure_asked(body: StructuredFields) -> Structure | None:
    """Raises InvalidRequestError."""
    grammar, param = body.structure()
    return Structure(grammar, param) if grammar else None


def require_alone(body: StructuredFields, found: Structure | None) -> None:
    """Raises InvalidRequestError for what a structure cannot be combined with, be it of the answer or of calls."""
    if found is None:
        return
    for name in ("allowed_token_ids", "bad_words", "ignore_eos"):
        if getattr(body, name):
            why = "the answer ends where its structure does" if name == "ignore_eos" else "no token might be left"
            raise InvalidRequestError(f"{name} cannot be combined with {found.param}: {why}", param=name)


def tried(text: TextModel, limits: Limits, found: Structure | None) -> Structure | None:
    """The same.

    Raises:
        InvalidRequestError: it takes too much.
        RunElsewhereError: that has to be found out elsewhere.
    """
    if found is not None and limits.is_apart:
        vet(text.tokenizer, found)
    elif found is not None and not is_known(found.grammar):
        raise RunElsewhereError
    return found


def short(ends: TurnEnds) -> TurnEnds:
    """Ends without texts that a request could not ask for as stop strings."""
    return TurnEnds(ends.token_ids, tuple(stop for stop in ends.stops if len(stop) <= MAX_STOP_CHARS))


def as_template_sees_it(message: Message) -> dict[str, Any]:
    fields = message.model_dump(include=TEMPLATE_FIELDS, exclude_none=True)
    if message.calls:  # templates test for the key alone
        fields["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.calls]
    for call in fields.get("tool_calls", ()):
        call.setdefault("type", "function")
        call.pop("index", None)
        call["function"].pop("parsed_arguments", None)
        call["function"]["arguments"] = call["function"].get("arguments") or "{}"
    # Templates join contents to other text; an assistant that said nothing said the empty text.
    fields.setdefault("content", "")
    fields["content"] = fields["content"] or message.refusal or fields["content"]
    fields["role"] = SAME_ROLES.get(message.role, message.role)
    if fields["role"] == "system":
        content = fields["content"]
        if isinstance(content, str):
            fields["content"] = without_header(content)
        else:
            fields["content"] = [part for each in content if (part := part_without_header(each))]
    return fields


def split_prompt(prompt: Prompt) -> tuple[list[str], list[list[int]]]:
    """The prompts as texts or as token ids; the other list is empty."""
    if isinstance(prompt, str):
        return [prompt], []
    texts = [item for item in prompt if isinstance(item, str)]
    ids = [item for item in prompt if isinstance(item, int)]
    lists = [item for item in prompt if isinstance(item, list)]
    return texts, [ids] if ids else lists


def encode(text: TextModel, limits: Limits, texts: list[str], add_special_tokens: bool, param: str) -> list[list[int]]:
    """Token ids of texts; those that cannot fit the context whatever their tokens are not even looked at."""
    limit = limits.max_model_len
    most = limit * text.longest_token
    if (longest := max(map(len, texts))) > most:
        raise ContextTooLongError(
            f"the model's context is {limit} tokens; a text of {longest} characters is more than that", param=param
        )
    return text.encode(texts, add_special_tokens)


def require_fits(limits: Limits, tokens: int, param: str) -> None:
    """Raises ContextTooLongError."""
    if tokens >= limits.max_model_len + 1:
        raise ContextTooLongError(
            f"the model's context is {limits.max_model_len} tokens, but the prompt has {tokens}", param=param
        )
