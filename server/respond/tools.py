"""Tools that chats know as functions only: those of a namespace, and custom ones, whose input is a text.

To the model a tool of a namespace is a function whose name begins with that of the namespace, and a custom one is a
function of one argument. The items of an answer, and those that come back, say it as the client does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from slipstream.server.errors import InvalidRequestError

INPUT = "input"
"""The argument of a custom tool."""
OF_CUSTOM: dict[str, Any] = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Called:
    """What a function is called by the client."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclass(frozen=True)
class Offered:
    """A tool as chat has it."""

    param: str
    """Where the client says it."""
    tool: dict[str, Any]
    called: Called

    @property
    def name(self) -> Any:
        return self.tool["function"].get("name")


def offered(tools: Sequence[dict[str, Any]]) -> list[Offered]:
    """Raises InvalidRequestError."""
    return [each for index, tool in enumerate(tools) for each in _offered(tool, f"tools.{index}")]


def _offered(tool: dict[str, Any], param: str) -> Iterator[Offered]:
    if tool.get("type") != "namespace":
        yield _one(tool, param)
        return
    name, inner = tool.get("name"), tool.get("tools")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"{param}.name: a text is needed", param=f"{param}.name")
    if not isinstance(inner, list) or not all(isinstance(each, dict) for each in inner):
        raise InvalidRequestError(f"{param}.tools: a list of tools is needed", param=f"{param}.tools")
    for index, each in enumerate(inner):
        about = each if each.get("description") else each | {"description": tool.get("description")}
        yield _one(about, f"{param}.tools.{index}", name)


def _one(tool: dict[str, Any], param: str, namespace: str | None = None) -> Offered:
    kind, name = tool.get("type"), tool.get("name")
    is_custom = kind == "custom"
    left_out = ("type", "format") if is_custom else ("type",)
    function = {field: value for field, value in tool.items() if field not in left_out and value is not None}
    if namespace is not None:
        function["name"] = flat(namespace, name)
    if is_custom:
        form = tool.get("format")
        if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
            raise InvalidRequestError(
                f"{param}.format: only text is supported; give the tool as a function to have its argument follow a "
                "schema",
                param=f"{param}.format",
                code="unsupported_parameter",
            )
        kind, function["parameters"] = "function", OF_CUSTOM
    called = Called(name if isinstance(name, str) else "", namespace, is_custom)
    return Offered(param, {"type": kind, "function": function}, called)


def flat(namespace: str, name: Any) -> Any:
    """The name of a function of a namespace among those of others."""
    return f"{namespace}__{name}" if isinstance(name, str) and name else name


def chosen(choice: str | dict[str, Any] | None, tools: Sequence[Offered]) -> str | dict[str, Any] | None:
    """A choice by the names that chat knows, where one tool is named."""
    if not isinstance(choice, dict) or choice.get("type") not in ("function", "custom"):
        return choice
    name, namespace = choice.get("name"), choice.get("namespace")
    meant = [
        each.name
        for each in tools
        if (each.name == name or each.called.name == name) and namespace in (None, each.called.namespace)
    ]
    return {"type": "function", "name": meant[0]} if len(meant) == 1 else choice


def as_arguments(text: str) -> str:
    """The input of a custom tool as the arguments of a function."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def as_input(arguments: str) -> str:
    """The reverse, also of arguments that were cut off; what is no such argument is the input as it is."""
    try:
        found = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return arguments
    if not isinstance(found, dict) or not found.keys() <= {INPUT}:
        return arguments
    said = found.get(INPUT, "")
    return said if isinstance(said, str) else arguments
