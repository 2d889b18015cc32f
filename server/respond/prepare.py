"""From the bytes of a body of /v1/responses to a conversation that is rendered and tokenized. See server/jobs.py."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from slipstream.server.errors import ContextTooLongError, InvalidRequestError
from slipstream.server.http.body import Body, parse
from slipstream.server.openai import prepare as openai
from slipstream.server.openai.schema import ChatBody
from slipstream.server.openai.translated import add_message, chat_body, open_assistant
from slipstream.server.openai.truncated import room_beside
from slipstream.server.preparing.prepared import Answered, Limits, Prepared
from slipstream.server.preparing.text_model import TextModel
from slipstream.server.respond.schema import CountInputTokensBody, Item, ItemPart, PromptFields, RespondBody
from slipstream.server.respond.tools import as_arguments, chosen, flat, offered

INSTRUCTING = ("system", "developer")
LENGTH_BYTES = 8
REFERENCE = "item_reference"
WITHOUT_ESCAPES = "previous_response_id: write the name of this field without escapes"
MAX_STORED_BYTES = 2**19
"""Most bytes of the input of a response that is kept."""

OF_TOOL = re.compile(r"tools\.(\d+)(.*)")
"""A field of a tool of chat."""

encode_json = msgspec.json.Encoder().encode


class Responding(Body):
    """A request that is prepared."""

    asked: RespondBody
    """Without its input."""
    chat: ChatBody
    items: bytes
    """The input as items, in JSON without the brackets of the list; empty if it is not to be kept."""


class KeptBody(Body):
    """Items as they were kept."""

    items: list[Item]


class Kept(msgspec.Struct):
    """What a body asks for of what is kept, by ids."""

    response: str | None = None
    """The response before."""
    items: list[str] = []


class _Referring(msgspec.Struct):
    previous_response_id: Any = None
    input: Any = None


def referred_to(text: TextModel, limits: Limits, raw: bytes) -> Kept:
    """What is wrong with the body is told by the next job."""
    try:
        found = msgspec.json.decode(raw, type=_Referring)
    except (ValueError, msgspec.DecodeError):
        return Kept()
    name, items = found.previous_response_id, found.input if isinstance(found.input, list) else ()
    references = [item for item in items if isinstance(item, dict) and item.get("type") == REFERENCE]
    return Kept(name if isinstance(name, str) else None, [str(item.get("id")) for item in references])


def framed(history: bytes, referred: bytes, raw: bytes) -> bytes:
    """A body with the turns before it, and with what it refers to: items in JSON without the brackets of the list."""
    sizes = [len(each).to_bytes(LENGTH_BYTES, "little") for each in (history, referred)]
    return b"".join((*sizes, history, referred, raw))


def unframed(data: bytes) -> tuple[list[Item], list[Item], bytes]:
    sizes = [int.from_bytes(data[at : at + LENGTH_BYTES], "little") for at in (0, LENGTH_BYTES)]
    begin = 2 * LENGTH_BYTES
    middle, end = begin + sizes[0], begin + sum(sizes)
    kept = data[begin:middle], data[middle:end]
    history, referred = (parse(KeptBody, b'{"items":[' + each + b"]}", "warn").items for each in kept)
    return history, referred, data[end:]


def respond(text: TextModel, limits: Limits, raw: bytes) -> Prepared[Any]:
    """``raw`` is framed. Raises InvalidRequestError, RunElsewhereError."""
    before, referred, raw = unframed(raw)
    body = parse(RespondBody, raw, limits.unknown_fields)
    given = items_of(body, referred)
    kept = b"" if body.store is False else kept_items(given)
    fields = chat_fields(body, before, given) | {
        "max_completion_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "user": body.user,
        "request_id": body.request_id,
        "logprobs": body.wants_logprobs,
        "top_logprobs": body.top_logprobs,
    }
    prepared = conversation(text, limits, fields, body, body.max_output_tokens)
    openai.require_fits(limits, len(prepared.prompts[0]), "input")
    done = Responding(asked=body.model_copy(update={"input": ""}), chat=prepared.body, items=kept)
    structure = prepared.structure
    if structure is not None:
        name = of_tool(structure.param, body) or renamed(structure.param)
        structure = replace(structure, param=name or structure.param)
    return Prepared(done, prepared.prompts, [], prepared.ends, structure, prepared.speech)


def count_input_tokens(text: TextModel, limits: Limits, raw: bytes) -> Answered:
    """``raw`` is framed. Also of what does not fit. Raises InvalidRequestError, RunElsewhereError."""
    before, referred, raw = unframed(raw)
    body = parse(CountInputTokensBody, raw, limits.unknown_fields)
    if body.previous_response_id is not None and b'"previous_response_id"' not in raw:
        raise InvalidRequestError(WITHOUT_ESCAPES, param="previous_response_id")
    fields = chat_fields(body, before, items_of(body, referred))
    [prompt] = conversation(text, limits, fields, body, None).prompts
    return openai.answer(body.model, {"object": "response.input_tokens", "input_tokens": len(prompt)})


def conversation(
    text: TextModel, limits: Limits, fields: dict[str, Any], body: PromptFields, answer: int | None
) -> Prepared[ChatBody]:
    """Raises InvalidRequestError with the names of this dialect."""
    try:
        chat = chat_body(fields, "input")
        if body.truncation == "auto":
            chat = without_first_turns(text, limits, chat, room_beside(limits, answer))
        return openai.conversation(text, limits, chat)
    except InvalidRequestError as error:
        name = of_tool(error.param, body) or renamed(error.param)
        message = error.message.replace(error.param, name, 1) if error.param and name else error.message
        raise type(error)(message, param=name, code=error.code) from None


def without_first_turns(text: TextModel, limits: Limits, chat: ChatBody, room: int) -> ChatBody:
    """As few of the first turns left out as can be for a prompt of ``room`` tokens; what the system says stays, and the
    last turn does. A turn begins with what the user says."""
    template = openai.template_for(text, limits, chat)
    told = openai.with_thinking(limits, chat, template)
    messages = chat.messages
    head = next((at for at, message in enumerate(messages) if message.role not in INSTRUCTING), len(messages))
    begins = [at for at in range(head + 1, len(messages)) if messages[at].role == "user"]

    def cut(turns: int) -> dict[str, Any]:
        return {"messages": messages[:head] + messages[begins[turns - 1] :] if turns else messages}

    def is_too_long(turns: int) -> bool:
        try:
            rendered = openai.render(limits, told.model_copy(update=cut(turns)), template)
            [prompt] = openai.encode(text, limits, [rendered], bool(chat.add_special_tokens), "input")
        except ContextTooLongError:
            return True
        return len(prompt) > room

    if not begins or not is_too_long(0):
        return chat
    fits = bisect_left(range(1, len(begins)), True, key=lambda turns: not is_too_long(turns)) + 1
    return chat.model_copy(update=cut(fits))


def items_of(body: PromptFields, referred: Sequence[Item]) -> list[Item]:
    """Raises InvalidRequestError."""
    given = (
        [Item.model_validate({"role": "user", "content": body.input})]
        if isinstance(body.input, str)
        else with_referred(body.input, {item.id: item for item in referred})
    )
    if not given:
        raise InvalidRequestError("input: at least one item is needed", param="input")
    return given


def with_referred(items: Sequence[Item], known: Mapping[str | None, Item]) -> list[Item]:
    """Items in place of their ids. Raises InvalidRequestError for one that is not known."""
    found: list[Item] = []
    for index, item in enumerate(items):
        if item.type != REFERENCE:
            found.append(item)
        elif (name := required(item, "id", "input", index)) in known:
            found.append(known[name])
        else:
            raise InvalidRequestError(
                f"input.{index}.id: there is no item {name[:100]!r}; items are kept with their responses, in memory",
                param=f"input.{index}.id",
                code="item_not_found",
            )
    return found


def kept_items(items: Sequence[Item]) -> bytes:
    """Raises InvalidRequestError if they are too large to be kept."""
    found = b",".join(encode_json(item.model_dump(exclude_none=True)) for item in items)
    if len(found) > MAX_STORED_BYTES:
        raise InvalidRequestError(
            f"store: an input of {len(found)} bytes is not kept, at most {MAX_STORED_BYTES} are; send store: false",
            param="store",
        )
    return found


def chat_fields(body: PromptFields, before: Sequence[Item], given: Sequence[Item]) -> dict[str, Any]:
    """Raises InvalidRequestError."""
    messages = messages_of(before, "previous_response_id") + messages_of(given, "input")
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    tools = offered(body.tools or ())
    fields = body.shared() | {
        "messages": messages,
        "model": body.model,
        "tools": [each.tool for each in tools] or None,
        "tool_choice": chosen(body.tool_choice, tools),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
    }
    if body.text is not None and (form := body.text.format) is not None and form.type != "text":
        fields["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            about = form.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
            fields["response_format"]["json_schema"] = about
    return fields


def messages_of(items: Iterable[Item], param: str) -> list[dict[str, Any]]:
    """Reasoning, text and calls that follow each other are one message of the assistant.

    Raises InvalidRequestError.
    """
    found: list[dict[str, Any]] = []
    speaks = False
    """Whether the last message is the assistant's, and goes on."""
    for index, item in enumerate(items):
        match item.type or "message":
            case "reasoning":
                thought = joined(item.content) or joined(item.summary)
                if thought:
                    open_assistant(found, speaks)["reasoning_content"] = thought
                    speaks = True
            case "function_call" | "custom_tool_call":
                name = required(item, "name", param, index)
                if item.type == "custom_tool_call":
                    arguments = as_arguments(required(item, "input", param, index))
                else:
                    arguments = required(item, "arguments", param, index)
                call = {
                    "id": required(item, "call_id", param, index),
                    "type": "function",
                    "function": {
                        "name": flat(item.namespace, name) if item.namespace else name,
                        "arguments": arguments,
                    },
                }
                open_assistant(found, speaks).setdefault("tool_calls", []).append(call)
                speaks = True
            case "function_call_output" | "custom_tool_call_output":
                required(item, "output", param, index)
                call_id = required(item, "call_id", param, index)
                found.append({"role": "tool", "tool_call_id": call_id, "content": joined(item.output)})
                speaks = False
            case _:
                role = required(item, "role", param, index)
                required(item, "content", param, index)
                if role == "assistant" and speaks and "content" not in found[-1] and "tool_calls" not in found[-1]:
                    found[-1]["content"] = joined(item.content)
                else:
                    add_message(found, role, joined(item.content))
                    speaks = role == "assistant"
    return found


def required(item: Item, field: str, param: str, index: int) -> Any:
    if (value := getattr(item, field)) is None:
        where = f"{param}.{index}.{field}"
        raise InvalidRequestError(f"missing field {where!r}", param=where, code="missing_required_parameter")
    return value


def joined(content: str | list[ItemPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def renamed(param: str | None) -> str | None:
    """What a field of chat is called here."""
    if param is None:
        return None
    if param.startswith("messages"):
        return "input"
    if param.startswith("response_format"):
        return "text.format" + param.removeprefix("response_format").removeprefix(".json_schema")
    if param == "reasoning_effort":
        return "reasoning.effort"
    return param


def of_tool(param: str | None, body: PromptFields) -> str | None:
    """What a field of a tool of chat is called here; None if it is no such field."""
    place = OF_TOOL.fullmatch(param or "")
    if place is None:
        return None
    return offered(body.tools or ())[int(place[1])].param + place[2].replace(".function.", ".", 1)


JOBS: dict[str, Callable[[TextModel, Limits, bytes], Any]] = {
    job.__name__: job for job in (referred_to, respond, count_input_tokens)
}
