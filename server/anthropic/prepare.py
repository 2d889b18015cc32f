"""From the bytes of a body of /v1/messages to a conversation that is rendered and tokenized. See server/jobs.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from slipstream.server.anthropic.errors import PATH
from slipstream.server.anthropic.schema import (
    ContentBlock,
    CountTokensBody,
    MessageBatchBody,
    MessagesBody,
    PromptFields,
    Texts,
)
from slipstream.server.batch.lines import RequestLine, model_of, one_line
from slipstream.server.batch.lines import encode as encode_line
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body, parse
from slipstream.server.openai import prepare as openai
from slipstream.server.openai.billing import without_header
from slipstream.server.openai.schema import ChatBody
from slipstream.server.openai.thinking import LEVEL
from slipstream.server.openai.translated import add_message, chat_body
from slipstream.server.preparing.prepared import Answered, Limits, Prepared
from slipstream.server.preparing.text_model import TextModel

TOOL_FIELDS = {"type", "name", "description", "strict", "input_schema", "cache_control", "eager_input_streaming"}
OFF = {"defer_loading": False, "allowed_callers": ["direct"], "input_examples": []}
"""Further fields of tools, with the values that ask for nothing."""
USUAL_EFFORT = "high"
"""Asks for nothing where a template has no levels."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Conversing(Body):
    """A request that is prepared."""

    asked: MessagesBody
    """Without what became the prompt."""
    chat: ChatBody


def converse(text: TextModel, limits: Limits, raw: bytes) -> Prepared[Any]:
    """Raises InvalidRequestError, RunElsewhereError."""
    body = parse(MessagesBody, raw, limits.unknown_fields)
    metadata = dict(body.metadata or {})
    user = metadata.pop("user_id", None)
    if user is not None and not isinstance(user, str):
        raise InvalidRequestError("metadata.user_id: it has to be a text", param="metadata.user_id")
    fields = chat_fields(body) | {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "metadata": metadata,
        "user": user,
        "request_id": body.request_id,
    }
    prepared = conversation(text, limits, fields)
    openai.require_fits(limits, len(prepared.prompts[0]), "messages")
    asked = body.model_copy(update={"messages": [], "system": None, "tools": None})
    done = Conversing(asked=asked, chat=prepared.body)
    return Prepared(done, prepared.prompts, [], prepared.ends, prepared.structure, prepared.speech)


def count_message_tokens(text: TextModel, limits: Limits, raw: bytes) -> Answered:
    """Also of what does not fit: who asks may want to know how much to leave out.

    Raises InvalidRequestError, RunElsewhereError.
    """
    body = parse(CountTokensBody, raw, limits.unknown_fields)
    [prompt] = conversation(text, limits, chat_fields(body)).prompts
    return openai.answer(body.model, {"input_tokens": len(prompt)})


@dataclass(frozen=True)
class MessageBatch:
    lines: bytes
    """A file of requests, as batches have them."""
    count: int
    model: str | None
    """That of the first request."""


def message_batch(text: TextModel, limits: Limits, raw: bytes) -> MessageBatch:
    """What the requests ask for is read when their turn comes. Raises InvalidRequestError."""
    known: set[str] = set()
    for index, request in enumerate(parse(MessageBatchBody, raw, "error").requests):
        if request.custom_id in known:
            param = f"requests.{index}.custom_id"
            raise InvalidRequestError(f"{param}: an earlier request has this id", param=param)
        known.add(request.custom_id)
    requests = msgspec.json.decode(raw, type=_Requests).requests
    lines = [RequestLine(each.custom_id, "POST", PATH, one_line(bytes(each.params))) for each in requests]
    return MessageBatch(b"".join(encode_line(each) + b"\n" for each in lines), len(lines), model_of(lines[0].body))


class _Request(msgspec.Struct):
    custom_id: str
    params: msgspec.Raw


class _Requests(msgspec.Struct):
    requests: list[_Request]


def conversation(text: TextModel, limits: Limits, fields: dict[str, Any]) -> Prepared[ChatBody]:
    """Raises InvalidRequestError with the names of this dialect."""
    if fields.get(LEVEL) == USUAL_EFFORT and (text.template is None or LEVEL not in text.template.text):
        fields = {name: value for name, value in fields.items() if name != LEVEL}
    try:
        prepared = openai.conversation(text, limits, chat_body(fields, "messages"))
    except InvalidRequestError as error:
        name = renamed(error.param)
        message = error.message.replace(error.param, name, 1) if error.param and name else error.message
        raise type(error)(message, param=name, code=error.code) from None
    structure = prepared.structure
    if structure is None:
        return prepared
    return replace(prepared, structure=replace(structure, param=renamed(structure.param) or structure.param))


def chat_fields(body: PromptFields) -> dict[str, Any]:
    messages = messages_of(body)
    fields = body.shared() | {
        "model": body.model,
        "messages": messages,
        # A conversation that ends with the assistant's words is one whose answer they begin.
        "continue_final_message": True if continues(messages) else None,
        "tools": [nested(tool, f"tools.{index}") for index, tool in enumerate(body.tools)] if body.tools else None,
    }
    if (choice := body.tool_choice) is not None:
        if choice.type == "tool":
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            fields["tool_choice"] = CHOICES[choice.type]
        fields["parallel_tool_calls"] = False if choice.disable_parallel_tool_use else None
    form = body.output_format if body.output_config is None else body.output_config.format or body.output_format
    if form is not None:
        about = {"name": form.name or "answer", "schema": form.schema_, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": about}
    is_off = body.thinking is not None and body.thinking.type == "disabled"
    if body.thinking is not None and body.thinking.type != "adaptive":
        fields["thinking"] = {"type": body.thinking.type}
    if body.output_config is not None and body.output_config.effort is not None and not is_off:
        fields[LEVEL] = body.output_config.effort
    return fields


def continues(messages: list[dict[str, Any]]) -> bool:
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and "tool_calls" not in last


def nested(tool: dict[str, Any], param: str) -> dict[str, Any]:
    """A tool as chat has it.

    Raises InvalidRequestError for tools that the service itself would run, and for what is not done with others.
    """
    if tool.get("type") not in (None, "custom"):
        raise InvalidRequestError(
            f"{param}.type: only tools of the client (custom) are supported",
            param=f"{param}.type",
            code="unsupported_parameter",
        )
    for name, value in tool.items():
        if value is not None and name not in TOOL_FIELDS and (name not in OFF or OFF[name] != value):
            raise InvalidRequestError(
                f"{param}.{name}: not supported by this server", param=f"{param}.{name}", code="unsupported_parameter"
            )
    function = {name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": function | {"parameters": tool.get("input_schema")}}


def messages_of(body: PromptFields) -> list[dict[str, Any]]:
    """Raises InvalidRequestError."""
    found: list[dict[str, Any]] = []
    if body.system is not None:
        system = body.system
        text = system if isinstance(system, str) else "".join(without_header(block.text) for block in system)
        add_message(found, "system", text)
    for index, turn in enumerate(body.messages):
        blocks = turn.content
        if isinstance(blocks, str):
            add_message(found, turn.role, blocks)
        elif turn.role == "assistant":
            found.append(spoken(blocks, f"messages.{index}.content"))
        else:
            found += heard(turn.role, blocks, f"messages.{index}.content")
    return found


def spoken(blocks: list[ContentBlock], param: str) -> dict[str, Any]:
    """The assistant's blocks as one message."""
    message: dict[str, Any] = {"role": "assistant"}
    for index, block in enumerate(blocks):
        at = f"{param}.{index}"
        match block.type:
            case "text":
                message["content"] = message.get("content", "") + required(block, "text", at)
            case "thinking":
                if thought := required(block, "thinking", at):  # nothing, where it was omitted
                    message["reasoning_content"] = message.get("reasoning_content", "") + thought
            case "redacted_thinking":
                pass
            case "tool_use":
                arguments = json.dumps(required(block, "input", at), ensure_ascii=False)
                function = {"name": required(block, "name", at), "arguments": arguments}
                call = {"id": required(block, "id", at), "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            case _:
                raise misplaced(block, at, "an assistant")
    return message


def heard(role: str, blocks: list[ContentBlock], param: str) -> list[dict[str, Any]]:
    """What tools gave back, each as a message, and text between them."""
    found: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        at = f"{param}.{index}"
        if block.type == "text":
            words = required(block, "text", at)
            words = without_header(words) if role == "system" else words
            if found and found[-1]["role"] == role:
                found[-1]["content"] += words
            else:
                add_message(found, role, words)
        elif block.type == "tool_result" and role == "user":
            result = joined(block.content or "")
            found.append(
                {
                    "role": "tool",
                    "tool_call_id": required(block, "tool_use_id", at),
                    "content": f"Error: {result}" if block.is_error else result,
                }
            )
        else:
            raise misplaced(block, at, f"a {role}")
    return found or [{"role": role, "content": ""}]


def misplaced(block: ContentBlock, param: str, who: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}.type: {who} message has no {block.type} blocks", param=f"{param}.type")


def required(block: ContentBlock, field: str, param: str) -> Any:
    if (value := getattr(block, field)) is None:
        where = f"{param}.{field}"
        raise InvalidRequestError(f"missing field {where!r}", param=where, code="missing_required_parameter")
    return value


def joined(content: Texts) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def renamed(param: str | None) -> str | None:
    """What a field of chat is called here."""
    if param is None:
        return None
    if param.startswith("response_format"):
        return "output_config.format" + param.removeprefix("response_format").removeprefix(".json_schema")
    if param.startswith("tools."):
        return param.replace(".function.parameters", ".input_schema", 1).replace(".function", "", 1)
    names = {
        LEVEL: "output_config.effort",
        "stop": "stop_sequences",
        "parallel_tool_calls": "tool_choice",
        "user": "metadata.user_id",
    }
    return names.get(param, param)


JOBS: dict[str, Callable[[TextModel, Limits, bytes], Any]] = {
    job.__name__: job for job in (converse, count_message_tokens, message_batch)
}
