"""Tools over HTTP: choices, streams, history; and what different chat templates make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest

from slipstream.server.anthropic.prepare import converse
from slipstream.server.config import ServerConfig
from slipstream.server.errors import InvalidRequestError
from slipstream.server.openai.prepare import chat
from slipstream.server.preparing.prepared import Limits, Prepared
from slipstream.server.preparing.text_model import TextModel, load_text_model
from slipstream.server.text import ChatTemplate
from slipstream.server.tools.formats import FORMATS
from slipstream.server.tools.prompt import with_results_told

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"City": {"enum": ["Rome", "Bern"]}}}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
MESSAGES = [{"role": "user", "content": "What is the weather in Rome?"}]
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]


def check_calls(calls: list[dict[str, Any]], *names: str) -> None:
    assert calls and len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function" and call["function"]["name"] in names
        arguments = json.loads(call["function"]["arguments"])
        assert arguments in ({"city": "Rome"}, {"city": "Bern"}) or call["function"]["name"] == "clock"


@pytest.mark.parametrize(
    ("choice", "parallel", "names"),
    [
        ("required", True, ("weather",)),
        ("any", True, ("weather",)),
        ("required", False, ("weather", "also")),
        ({"type": "function", "function": {"name": "weather"}}, None, ("weather",)),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"name": "also"}]}},
            False,
            ("also",),
        ),
    ],
)
def test_calls_that_have_to_come_come_streamed_and_whole(
    server: Any, choice: Any, parallel: bool, names: tuple[str, ...]
) -> None:
    also = {"type": "function", "function": {**WEATHER["function"], "name": "also"}}  # type: ignore[dict-item]
    body = {"messages": MESSAGES, "tools": [WEATHER, also] if len(names) > 1 or "also" in names else [WEATHER]}
    body |= {"tool_choice": choice, "parallel_tool_calls": parallel, "max_tokens": 300, "temperature": 1.0, "seed": 4}
    status, whole = server.post("/v1/chat/completions", body)
    assert status == 200, whole
    [answer] = whole["choices"]
    calls = answer["message"].get("tool_calls") or []
    check_calls(calls, *names)
    assert answer["message"]["content"] is None
    assert len(calls) == 1 or parallel
    assert answer["finish_reason"] == ("tool_calls" if len(calls) < 5 else answer["finish_reason"])

    streamed: list[dict[str, Any]] = []
    for event in server.events("/v1/chat/completions", body)[:-1]:
        for piece in event["choices"]:
            assert not piece["delta"].get("content")
            for call in piece["delta"].get("tool_calls", ()):
                if call["index"] == len(streamed):
                    assert call["function"]["arguments"] == ""
                    streamed.append(call)
                else:
                    streamed[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            reason = piece["finish_reason"]
    assert [call["function"] for call in streamed] == [call["function"] for call in calls]
    assert reason == answer["finish_reason"]


def test_answers_without_calls_stay_what_they_are(server: Any) -> None:
    for tools in ({"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
        [choice] = server.chat("Hello", max_tokens=12, **tools)["choices"]
        assert "tool_calls" not in choice["message"] and choice["message"]["content"]
    [choice] = server.chat("Hello", max_tokens=12, tools=[WEATHER], logprobs=True, return_token_ids=True)["choices"]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    body = {"messages": MESSAGES, "tools": [WEATHER], "max_tokens": 12, "return_token_ids": True, "logprobs": True}
    events = server.events("/v1/chat/completions", body)[:-1]
    tokens = [token for event in events for piece in event["choices"] for token in piece.get("token_ids") or ()]
    whole = server.chat(MESSAGES[0]["content"], **{k: v for k, v in body.items() if k != "messages"})
    assert tokens == whole["choices"][0]["token_ids"]


def test_calls_and_results_in_the_history_reach_the_prompt(server: Any) -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}', "parsed_arguments": {"x": "unseen"}}
    call = {"id": "call_1", "type": "function", "index": 0, "function": function}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees"},
    ]
    status, found = server.post("/tokenize", {"messages": messages, "tools": [WEATHER]})
    assert status == 200
    prompt = server.post("/detokenize", {"tokens": found["tokens"]})[1]["prompt"]
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in prompt
    assert "22 degrees" in prompt and '"description": "Now."' in prompt and "You can call these tools" in prompt
    assert "unseen" not in prompt
    assert server.chat(messages[0]["content"], messages=messages, max_tokens=3, tools=[WEATHER])


def test_functions_are_tools_by_their_first_name(server: Any) -> None:
    function = WEATHER["function"]
    body = {"messages": MESSAGES, "max_tokens": 300, "temperature": 1.0, "seed": 4}
    as_tool = body | {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    as_function = body | {"functions": [function], "function_call": {"name": "weather"}}
    [expected] = server.post("/v1/chat/completions", as_tool)[1]["choices"]
    status, reply = server.post("/v1/chat/completions", as_function)
    assert status == 200, reply
    [answer] = reply["choices"]
    [call] = expected["message"]["tool_calls"]
    assert answer["message"]["function_call"] == call["function"]
    assert answer["message"]["content"] is None and "tool_calls" not in answer["message"]
    assert answer["finish_reason"] == "function_call"

    called: dict[str, str] = {}
    for event in server.events("/v1/chat/completions", as_function)[:-1]:
        [piece] = event["choices"]
        assert "tool_calls" not in piece["delta"]
        for name, said in piece["delta"].get("function_call", {}).items():
            called[name] = called.get(name, "") + said
    assert called == call["function"] and piece["finish_reason"] == "function_call"

    [answer] = server.chat("Hello", max_tokens=12, functions=[function], function_call="none")["choices"]
    assert "function_call" not in answer["message"] and answer["finish_reason"] in ("stop", "length")


def test_functions_make_the_prompt_that_tools_make(server: Any) -> None:
    function, call = WEATHER["function"], {"name": "weather", "arguments": '{"city": "Rome"}'}

    def prompt(fields: dict[str, Any], called: dict[str, Any], *results: dict[str, Any]) -> str:
        messages = [*MESSAGES, {"role": "assistant", "content": None, **called}, *results]
        status, found = server.post("/tokenize", {"messages": messages, **fields})
        assert status == 200, found
        text: str = server.post("/detokenize", {"tokens": found["tokens"]})[1]["prompt"]
        return text

    said = {"content": "22 degrees"}
    tools = prompt({"tools": [WEATHER]}, {"tool_calls": [{"id": "a", "function": call}]},
                   {"role": "tool", "tool_call_id": "a", **said})  # fmt: skip
    result = {"role": "function", "name": "weather", **said}
    assert prompt({"functions": [function]}, {"function_call": call}, result) == tools
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in tools and "22 degrees" in tools
    nothing = {"role": "function", "name": "weather", "content": None}
    assert prompt({"functions": [function]}, {"function_call": call}, nothing) == tools.replace("22 degrees", "")


def test_results_without_ids_are_told_by_their_names() -> None:
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}, {"function": {"name": "g"}}]},
                *({"role": "tool", "name": name, "content": "1"} for name in "fg")]  # fmt: skip
    assert with_results_told(messages)[1:] == [{"role": "user", "content": "Result of f:\n1\n\nResult of g:\n1"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{}]}, "functions.0.name"),
        ({"functions": [{"name": "f", "parameters": [1]}]}, "functions.0.parameters"),
        ({"functions": [{"name": "f", "parameters": {"type": "strng"}}]}, "functions.0.parameters.type"),
        ({"functions": [WEATHER["function"]], "tools": [WEATHER]}, "functions"),
        ({"functions": [WEATHER["function"]], "tool_choice": "none"}, "functions"),
        ({"functions": [WEATHER["function"]], "function_call": {"name": "other"}}, "function_call"),
        ({"functions": [WEATHER["function"]], "function_call": "maybe"}, "function_call"),
        ({"functions": [WEATHER["function"]], "function_call": {"name": "weather"}, "bad_words": ["{"]}, "bad_words"),
        ({"function_call": "auto"}, "function_call"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "x": 1}}]}, "messages.0.function_call.x"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"},
                           "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages.0.function_call",
        ),
    ],
)  # fmt: skip
def test_functions_that_make_no_sense_are_refused_by_name(server: Any, fields: dict[str, Any], param: str) -> None:
    status, reply = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5, **fields})
    assert status == 400 and reply["error"]["param"] == param, reply


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": [1]}}]}, "tools.0.function.parameters"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": ["weather"]}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": ["weather"]}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": 5}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "bad_words": ["{"]}, "bad_words"),
        ({"tools": [STRICT], "ignore_eos": True}, "ignore_eos"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{**WEATHER, "function": {"name": "f", "parameters": {"type": "strng"}}}],
          "tool_choice": "required"}, "tools.0.function.parameters.type"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(server: Any, fields: dict[str, Any], param: str) -> None:
    status, reply = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5, **fields})
    assert status == 400 and reply["error"]["param"] == param, reply


TEMPLATE = """{%- if tools %}TOOLS{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif -%}
{%- for message in messages %}[{{ message.role }}]{{ message.content }}
{%- for call in message.tool_calls or [] %}MARK{{ call.function | tojson }}{% endfor %}{% endfor -%}
{%- if add_generation_prompt %}[assistant]{{ opening or '' }}{% endif -%}"""


@pytest.fixture(scope="module")
def text() -> TextModel:
    return load_text_model("default", ServerConfig())


LIMITS = Limits(
    model_names=("x",),
    max_model_len=8192,
    vocab_size=49152,
    max_prompts=1,
    unknown_fields="error",
    request_templates="here",
)


def prepared(text: TextModel, marker: str, limits: Limits = LIMITS, **body: Any) -> Prepared[Any]:
    source = TEMPLATE.replace("MARK", marker)
    asked = {"messages": MESSAGES, "chat_template": source, **body}
    return chat(text, limits, json.dumps(asked).encode())


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_a_schema_that_is_none_is_refused_with_its_tool_and_place(server: Any, choice: str) -> None:
    wrong = {"type": "object", "properties": {"city": {"type": "strin"}}}
    tools = [WEATHER, {"type": "function", "function": {"name": "search", "parameters": wrong}}, CLOCK]
    status, reply = server.post("/v1/chat/completions", {"messages": MESSAGES, "tools": tools, "tool_choice": choice})
    place = "tools.1.function.parameters.properties.city.type"
    assert (status, reply["error"]["param"]) == (400, place)
    assert "'strin' (the tool search)" in reply["error"]["message"]

    flat = [{"type": "function", **tool["function"]} for tool in tools]  # type: ignore[dict-item]
    status, reply = server.post("/v1/responses", {"input": "Hello", "tools": flat, "tool_choice": choice})
    assert (status, reply["error"]["param"]) == (400, "tools.1.parameters.properties.city.type")
    assert reply["error"]["message"].startswith("tools.1.parameters.properties.city.type: ")

    here = [{"name": "clock", "input_schema": CITY}, {"name": "search", "input_schema": wrong}]
    kind = {"type": "any" if choice == "required" else choice}
    body = {"model": "tiny", "max_tokens": 1, "messages": MESSAGES, "tools": here, "tool_choice": kind}
    status, reply = server.post("/v1/messages", body)
    assert status == 400
    assert reply["error"]["message"].startswith("tools.1.input_schema.properties.city.type: ")


def test_a_schema_of_an_answer_that_is_none_is_refused_with_its_place(server: Any) -> None:
    wrong = {"type": "object", "properties": {"city": {"type": "strin"}}}
    form = {"type": "json_schema", "name": "x", "schema": wrong}
    status, reply = server.post("/v1/responses", {"input": "Hello", "text": {"format": form}})
    assert (status, reply["error"]["param"]) == (400, "text.format.schema.properties.city.type")
    body = {"model": "tiny", "max_tokens": 1, "messages": MESSAGES, "output_config": {"format": form}}
    status, reply = server.post("/v1/messages", body)
    assert reply["error"]["message"].startswith("output_config.format.schema.properties.city.type: "), reply


@pytest.mark.parametrize(
    ("marker", "name"),
    [("<tool_call>", "hermes"), ("<|python_tag|>", "llama3_json"), ("[TOOL_CALLS]", "mistral"), ("-", "json")],
)
def test_templates_decide_the_format_and_the_grammar(text: TextModel, marker: str, name: str) -> None:
    auto = prepared(text, marker, tools=[WEATHER, CLOCK])
    assert auto.speech is not None and auto.speech.tool_format == name and auto.structure is None
    assert auto.speech.tool_names == ("weather", "clock") and auto.speech.most_calls is None
    assert 'TOOLS{"type"' in text.tokenizer.decode(auto.prompts[0])
    for fields in ({"tool_choice": "required"}, {"tools": [STRICT]}, {"parallel_tool_calls": False}):
        found = prepared(text, marker, **({"tools": [WEATHER]} | fields))
        assert found.structure is not None and '"Rome"' in found.structure.grammar
    none = prepared(text, marker, tools=[WEATHER], tool_choice="none")
    assert none.speech is None and "TOOLS" in text.tokenizer.decode(none.prompts[0])
    forced = prepared(text, marker, replace(LIMITS, tool_call_parser="hermes"), tools=[WEATHER])
    assert forced.speech is not None and forced.speech.tool_format == "hermes"
    with pytest.raises(InvalidRequestError, match="--tool-call-parser none"):
        prepared(text, marker, replace(LIMITS, tool_call_parser="none"), tools=[WEATHER])


def test_reasoning_is_looked_for_where_a_template_knows_it(text: TextModel) -> None:
    assert prepared(text, "-").speech is None
    opened = prepared(text, "<think>", chat_template_kwargs={"opening": "<think>\n"})
    assert opened.speech is not None and opened.speech.reasoning == "think" and opened.speech.is_open is True
    closed = prepared(text, "<think>", chat_template_kwargs={"opening": "<think>\n\n</think>\n\n"})
    assert closed.speech is not None and closed.speech.is_open is False
    for said, is_open in (("<think>\nWell,", True), ("<think>a</think>\nIt", False), ("It", False)):
        messages = [*MESSAGES, {"role": "assistant", "content": said}]
        goes_on = prepared(text, "<think>", messages=messages, continue_final_message=True)
        assert goes_on.speech is not None and goes_on.speech.is_open is is_open
    channels = prepared(text, "<|channel|>analysis<|message|>", tools=[WEATHER])
    assert channels.speech is not None and channels.speech.reasoning == "harmony"
    asked = {"response_format": {"type": "json_object"}}
    assert "thought" in prepared(text, "<think>", **asked).structure.grammar  # type: ignore[union-attr]
    assert prepared(text, "<think>", replace(LIMITS, reasoning_parser="none")).speech is None
    assert set(FORMATS) | {"auto", "none"} == set(get_args(get_type_hints(ServerConfig)["tool_call_parser"]))


@pytest.mark.parametrize(
    ("fields", "opening"),
    [
        ({}, "unset"),
        ({"enable_thinking": False}, "off"),
        ({"think": True, "thinking": {"type": "enabled"}}, "on"),
        ({"reasoning_effort": "none"}, "off"),
        ({"reasoning_effort": "low"}, "on-low"),
        ({"think": True, "chat_template_kwargs": {"enable_thinking": False}}, "off"),
    ],
)
def test_templates_are_told_of_thinking(text: TextModel, fields: dict[str, Any], opening: str) -> None:
    template = """{{ messages[0].content }}[{% if enable_thinking is defined %}
    {%- if enable_thinking %}on{% else %}off{% endif %}{% else %}unset{% endif %}
    {%- if reasoning_effort is defined %}-{{ reasoning_effort }}{% endif %}]"""
    [prompt] = prepared(text, "", chat_template=template, **fields).prompts
    assert text.tokenizer.decode(prompt).endswith(f"[{opening}]")


def test_a_level_makes_models_without_levels_think(text: TextModel) -> None:
    template = "{{ messages[0].content }}[{{ 'on' if enable_thinking else 'off' }}]"
    for effort, opening in (("low", "on"), ("minimal", "on"), ("none", "off")):
        [prompt] = prepared(text, "", chat_template=template, reasoning_effort=effort).prompts
        assert text.tokenizer.decode(prompt).endswith(f"[{opening}]")


def test_thinking_that_would_not_come_is_refused(text: TextModel) -> None:
    for fields in ({"think": True}, {"reasoning_effort": "low"}):
        assert prepared(text, "<think>", **fields).prompts, "it is marked, so the model does it anyway"
    for fields in ({"think": True}, {"reasoning_effort": "low"}, {"enable_thinking": True, "think": False}):
        with pytest.raises(InvalidRequestError) as refused:
            prepared(text, "-", **fields)
        assert refused.value.param == next(iter(fields))


def test_effort_of_messages_is_a_level_of_the_template(text: TextModel) -> None:
    def prompt(template: str, **fields: Any) -> str:
        told = replace(text, template=ChatTemplate(template, text.tokenizer.special_tokens))
        body = {"model": "tiny", "max_tokens": 1, "messages": MESSAGES, **fields}
        [found] = converse(told, LIMITS, json.dumps(body).encode()).prompts
        return text.tokenizer.decode(found)

    with_levels = "{{ reasoning_effort | default('usual') }}"
    for effort, level in (("low", "low"), ("high", "high"), (None, "usual")):
        assert prompt(with_levels, output_config={"effort": effort}) == level
    assert prompt("without", output_config={"effort": "high"}) == "without"
    assert prompt(with_levels, output_config={"effort": "max"}, thinking={"type": "disabled"}) == "usual"
    with pytest.raises(InvalidRequestError, match=r"output_config\.effort: .* no thinking"):
        prompt("without", output_config={"effort": "medium"})
    assert prompt("{{ enable_thinking }}", output_config={"effort": "medium"}) == "True"


def test_special_tokens_that_mean_something_stay_in_the_text(text: TextModel) -> None:
    special = next(iter(text.tokenizer.special_texts))
    assert text.tokenizer.symbols(f"a{special}b") == f'"a" <[{text.tokenizer.special_texts[special]}]> "b"'
    assert ChatTemplate("x").text == "x"
    assert prepared(text, "<tool_call>", tools=[WEATHER]).speech.keeps_special is False  # type: ignore[union-attr]
