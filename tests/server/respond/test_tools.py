"""Tools of namespaces and custom tools of /v1/responses, as coding agents send them, through the OpenAI client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from slipstream.server.respond.tools import as_arguments, as_input

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
LOOK: Any = {"type": "function", "name": "look", "parameters": CITY, "strict": True}
WEATHER: Any = {"type": "namespace", "name": "mcp__weather", "description": "Of cities.", "tools": [LOOK]}
SHELL: Any = {"type": "custom", "name": "shell", "description": "Runs a line.", "format": {"type": "text"}}
ASKED: Any = {"model": "tiny-model", "input": "Rome?", "temperature": 0, "max_output_tokens": 60}


def tokens(server: Any, **fields: Any) -> int:
    status, found = server.post("/v1/responses/input_tokens", {"input": "Rome?", **fields})
    assert status == 200, found
    counted: int = found["input_tokens"]
    return counted


@pytest.mark.parametrize("choice", ["look", "mcp__weather__look"])
def test_a_tool_of_a_namespace_is_called_by_its_own_name(client: openai.OpenAI, choice: str) -> None:
    asked = ASKED | {"tools": [WEATHER, SHELL], "tool_choice": {"type": "function", "name": choice}}
    call: Any = client.responses.create(**asked).output[0]
    assert (call.type, call.name, call.namespace) == ("function_call", "look", "mcp__weather")
    assert json.loads(call.arguments)["city"] in ("Rome", "Bern")
    events: list[Any] = list(client.responses.create(**asked, stream=True))
    for kind in ("added", "done"):
        [item] = [event.item for event in events if event.type == f"response.output_item.{kind}"]
        assert (item.name, item.namespace) == ("look", "mcp__weather")
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert (done.name, done.arguments) == ("look", call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}
    history = [{"role": "user", "content": "Rome?"}, call, result]
    assert client.responses.create(**ASKED | {"input": history, "tools": [WEATHER]}).output


def test_a_custom_tool_has_a_text_for_its_input(client: openai.OpenAI) -> None:
    asked = ASKED | {"tools": [LOOK, SHELL], "tool_choice": {"type": "custom", "name": "shell"}}
    call: Any = client.responses.create(**asked).output[0]
    assert (call.type, call.name) == ("custom_tool_call", "shell") and call.id.startswith("ctc_")
    assert call.input and not call.input.startswith("{")
    events: list[Any] = list(client.responses.create(**asked, stream=True))
    told = "".join(each.delta for each in events if each.type == "response.custom_tool_call_input.delta")
    [done] = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    assert told == done.input == call.input
    assert not [event for event in events if "function_call" in event.type]
    [item] = events[-1].response.output
    assert item.input == call.input
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    history = [{"role": "user", "content": "Rome?"}, call, result]
    assert client.responses.create(**ASKED | {"input": history, "tools": [SHELL]}).output


def test_they_are_functions_to_the_model(server: Any) -> None:
    look = LOOK | {"name": "mcp__weather__look", "description": "Of cities."}
    shell = {"type": "function", "name": "shell", "description": "Runs a line.", "parameters": {
        "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
        "additionalProperties": False}}  # fmt: skip
    assert tokens(server, tools=[WEATHER, SHELL]) == tokens(server, tools=[look, shell])
    call = {"type": "function_call", "call_id": "a", "name": "shell", "arguments": json.dumps({"input": 'a "b"\n'})}
    result = {"type": "function_call_output", "call_id": "a", "output": "done"}
    custom = {"type": "custom_tool_call", "call_id": "a", "name": "shell", "input": 'a "b"\n', "id": "ctc_1"}
    answered = {"type": "custom_tool_call_output", "call_id": "a", "output": "done"}
    assert tokens(server, input=[custom, answered]) == tokens(server, input=[call, result])
    inner = call | {"namespace": "mcp__weather", "name": "look"}
    assert tokens(server, input=[inner]) == tokens(server, input=[call | {"name": "mcp__weather__look"}])


@pytest.mark.parametrize("text", ["", "pwd", 'echo "hi"\n', "ü🎉", '{"input": "x"}'])
def test_an_input_comes_back_as_it_was(text: str) -> None:
    assert as_input(as_arguments(text)) == text


@pytest.mark.parametrize(
    ("arguments", "text"), [('{"inp', ""), ('{"input": "a b', "a b"), ("", ""), ('{"input": "a\\', "a")]
)
def test_an_input_may_be_cut_off(arguments: str, text: str) -> None:
    assert as_input(arguments) == text


@pytest.mark.parametrize("arguments", ["pwd", '{"cmd": "pwd"}', '{"input": 7}', '{"input": "a", "b": 1}', "[]"])
def test_other_arguments_are_the_input(arguments: str) -> None:
    assert as_input(arguments) == arguments


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [LOOK, {**WEATHER, "tools": [LOOK, LOOK | {"name": ""}]}]}, "tools.1.tools.1.name"),
        ({"tools": [LOOK, {**WEATHER, "tools": [LOOK | {"parameters": 5}]}]}, "tools.1.tools.0.parameters"),
        ({"tools": [WEATHER, LOOK | {"name": "a b"}]}, "tools.1.name"),
        ({"tools": [WEATHER | {"tools": None}]}, "tools.0.tools"),
        ({"tools": [WEATHER | {"tools": [{"type": "web_search"}]}]}, "tools.0.tools.0.type"),
        ({"tools": [WEATHER | {"name": 5}]}, "tools.0.name"),
        ({"tools": [SHELL | {"format": {"type": "grammar", "syntax": "lark", "definition": "x"}}]}, "tools.0.format"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "listen"}}, "tool_choice"),
        ({"input": [{"type": "custom_tool_call", "call_id": "a", "name": "shell"}]}, "input.0.input"),
    ],
)
def test_what_is_wrong_is_named_where_it_stands(server: Any, fields: Any, param: str) -> None:
    status, found = server.post("/v1/responses", {"input": "x", **fields})
    assert (status, found["error"]["param"]) == (400, param), found
    assert param in found["error"]["message"]
