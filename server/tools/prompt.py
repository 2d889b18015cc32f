"""Tells a model of its tools in words, where its chat template does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from slipstream.server.tools.formats import ToolFormat
from slipstream.server.tools.written import all_written


def told_of_tools(
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    form: ToolFormat,
    role: Literal["system", "user"] = "system",
) -> list[dict[str, Any]]:
    """The messages with what the tools are and how they are called at the end of the system's; or, for templates that
    know no system, before what the user says first."""
    arguments = "{…}" if form.is_object or form.header else '{"ARGUMENT": "VALUE"}'
    example = all_written(form, [("NAME", arguments)])
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    words = f"You can call these tools:\n{listed}\nTo call one, write {example} and nothing after it."
    first = messages[0] if messages else {}
    if first.get("role") != role:
        return [{"role": role, "content": words}, *messages]
    said = (text_of(first), words) if role == "system" else (words, text_of(first))
    return [{**first, "content": "\n\n".join(said)}, *messages[1:]]


def with_results_told(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with what tools gave back as words of the user, for templates that do not know such messages.

    Those of several calls, and what the user says next, are one message: some templates want turns to alternate.
    """
    names = {call.get("id"): call["function"]["name"] for each in messages for call in each.get("tool_calls", ())}
    found: list[dict[str, Any]] = []
    before = ""
    for message in messages:
        said = message
        if message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id")) or "the tool"
            said = {"role": "user", "content": f"Result of {name}:\n{text_of(message)}"}
        if before == "tool" and said["role"] == "user":
            said = {**said, "content": f"{found.pop()['content']}\n\n{text_of(said)}"}
        found.append(said)
        before = message["role"]
    return found


def without_calls(messages: Sequence[dict[str, Any]], form: ToolFormat) -> list[dict[str, Any]]:
    """The messages with calls of tools as text, for templates that do not know them."""
    return [_as_text(message, form) if message.get("tool_calls") else message for message in messages]


def _as_text(message: dict[str, Any], form: ToolFormat) -> dict[str, Any]:
    calls = [call["function"] for call in message["tool_calls"]]
    text = all_written(form, [(call["name"], call.get("arguments") or "{}") for call in calls])
    content = text_of(message)
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": f"{content}\n{text}" if content else text}


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(str(part.get("text", "")) for part in content)
