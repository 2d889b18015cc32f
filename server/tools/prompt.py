"""Tells a model of its tools in words, where its chat template does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from slipstream.server.tools.formats import ToolFormat


def told_of_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], form: ToolFormat
) -> list[dict[str, Any]]:
    """The messages with what the tools are and how they are called at the end of the system's."""
    head, middle, tail = form.call
    example = form.begin + form.before + head + "NAME" + middle + "{…}" + tail + form.after
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    words = f"You can call these tools:\n{listed}\nTo call one, write {example} and nothing after it."
    first = messages[0] if messages else {}
    if first.get("role") == "system" and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def without_calls(messages: Sequence[dict[str, Any]], form: ToolFormat) -> list[dict[str, Any]]:
    """The messages with calls of tools as text, for templates that do not know them."""
    return [_as_text(message, form) if message.get("tool_calls") else message for message in messages]


def _as_text(message: dict[str, Any], form: ToolFormat) -> dict[str, Any]:
    head, middle, tail = form.call
    calls = [call["function"] for call in message["tool_calls"]]
    written = [head + call["name"] + middle + (call.get("arguments") or "{}") + tail for call in calls]
    if form.begins_each:
        text = form.separator.join(form.begin + form.before + each + form.after for each in written)
    else:
        text = form.begin + form.before + form.separator.join(written) + form.after
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content)
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": f"{content}\n{text}" if content else text}
