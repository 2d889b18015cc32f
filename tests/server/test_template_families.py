"""What conversations with tools become in templates of families that know less of tools than others."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from slipstream.server.config import ServerConfig
from slipstream.server.errors import InvalidRequestError
from slipstream.server.openai.prepare import chat
from slipstream.server.preparing.prepared import Limits
from slipstream.server.preparing.text_model import TextModel, load_text_model

STRICT_TURNS = """{% for m in messages -%}
{% if m.role == 'system' %}{{ raise_exception('there is no system') }}{% endif -%}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns have to alternate') }}{% endif -%}
<{{ m.role }}>{{ m.content | trim }}
{% endfor %}"""
"""As Gemma's."""
LEAVES_OUT = """{% for m in messages -%}
{% if m.role in ('system', 'user', 'assistant') %}<{{ m.role }}>{{ m.content }}
{% endif %}{% endfor %}"""
"""As Phi-3's."""
OF_ITS_OWN = """{% for m in messages -%}
<{{ m.role }}>{{ m.content }}{% if 'tools' in m and m.tools is not none %}TOOLS{{ m.tools }}{% endif %}
{% endfor %}"""
"""As Phi-4-mini's, which looks for tools in the message of the system."""
EAGER = """{% for m in messages %}<{{ m.role }}>{% if 'tool_calls' in m -%}
{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif -%}
{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson -}}
{% else %}{{ m.content }}{% endif %}
{% endfor %}{{ tools }}"""
"""As Llama's, which takes what has the key for a call."""

JOINS_TEXTS = """{% for m in messages -%}
{% if m.tool_calls %}<call>{{ '' + m.tool_calls[0].function.arguments + '' }}</call>{% endif -%}
{% if m.content is not none %}<{{ m.role }}>{{ '' + m.content }}{% endif -%}
{% endfor %}{{ tools }}"""
"""As DeepSeek's."""
JOINS_MEMBERS = """{% for m in messages -%}
<{{ m.role }}>{{ m.content | trim }}
{%- for call in m.tool_calls or [] %}<call>
{%- for k, v in call.function.arguments | items %}{{ k }}={{ v }};{% endfor %}</call>
{%- endfor %}{% endfor %}{{ tools }}"""
"""As those of Qwen3-Coder and GLM."""
SHORT_IDS = """{% macro named(id) %}{% if id is not defined or id | length != 9 -%}
{{ raise_exception('ids have nine characters') }}{% endif %}({{ id }}){% endmacro -%}
{% for m in messages -%}
{% for call in m.tool_calls or [] %}{{ named(call.id) }}{% endfor -%}
{% if m.role == 'tool' %}{{ named(m.tool_call_id) }}{% endif %}<{{ m.role }}>{{ m.content }}
{% endfor %}{{ tools }}"""
"""As Mistral's."""
GOES_THROUGH = """{% if tools is defined %}{% for tool in tools %}{{ tool }}{% endfor %}{% endif -%}
{{ messages[0].content }}"""
"""As some of Phi's."""

FIRST_ONLY = """{% for m in messages -%}
<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}<call>
{{- m.tool_calls[0].function.arguments | tojson }}</call>{% endif -%}
{% endfor %}{{ tools }}"""
"""As that of gpt-oss."""

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASKED = {"role": "user", "content": "Rome and Bern?"}
LIMITS = Limits(("x",), 8192, 49152, 1, "error", "here")


@pytest.fixture(scope="module")
def text() -> TextModel:
    return load_text_model("default", ServerConfig())


def rendered(text: TextModel, template: str, messages: list[dict[str, Any]], **body: Any) -> str:
    asked = {"messages": messages, "chat_template": template, **body}
    return text.tokenizer.decode(chat(text, LIMITS, json.dumps(asked).encode()).prompts[0])


def call(number: int, **function: Any) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": "weather", **function}}


CALLED = {"role": "assistant", "tool_calls": [call(1, arguments='{"city": "Rome"}'), call(2, arguments="{}")]}
RESULTS = [
    {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "12 degrees"}]},
]


@pytest.mark.parametrize("template", [STRICT_TURNS, LEAVES_OUT])
def test_results_reach_models_whose_templates_have_no_role_for_them(text: TextModel, template: str) -> None:
    found = rendered(text, template, [ASKED, CALLED, *RESULTS, {"role": "user", "content": "So?"}])
    _, _, results = found.partition('"arguments": {}')
    assert results.count("<user>") == 1 and "<tool>" not in found
    assert results.index("22 degrees") < results.index("12 degrees") < results.index("So?")
    assert results.count("Result of weather:") == 2


def test_a_role_that_a_template_shows_stays(text: TextModel) -> None:
    assert "<tool>22 degrees" in rendered(text, OF_ITS_OWN, [ASKED, CALLED, *RESULTS])


@pytest.mark.parametrize("template", [STRICT_TURNS, LEAVES_OUT, OF_ITS_OWN])
def test_tools_reach_models_whose_templates_do_not_tell_of_them(text: TextModel, template: str) -> None:
    found = rendered(text, template, [ASKED], tools=TOOLS)
    assert '"name": "weather"' in found and "Rome and Bern?" in found
    assert found.startswith("<user>You can call" if template is STRICT_TURNS else "<system>You can call")


def test_documents_reach_templates_that_know_of_them_and_are_refused_elsewhere(text: TextModel) -> None:
    knows = "{% for d in documents or [] %}[{{ d.title }}]{% endfor %}" + LEAVES_OUT
    documents = [{"title": "Alps", "text": "High."}]
    assert rendered(text, knows, [ASKED], documents=documents).startswith("[Alps]<user>")
    assert rendered(text, knows, [ASKED], documents=[]).startswith("<user>")
    with pytest.raises(InvalidRequestError, match="knows of none"):
        rendered(text, LEAVES_OUT, [ASKED], documents=documents)


def test_calls_without_arguments_and_lists_without_calls(text: TextModel) -> None:
    for arguments in ({}, {"arguments": None}, {"arguments": ""}):
        calls = {"role": "assistant", "content": None, "tool_calls": [call(1, **arguments)]}
        assert "weather{}" in rendered(text, EAGER, [ASKED, calls, RESULTS[0]])
    said = {"role": "assistant", "content": "Yes.", "tool_calls": []}
    assert "<assistant>Yes." in rendered(text, EAGER, [ASKED, said, ASKED])


def test_arguments_that_are_nested_too_deeply_are_text(text: TextModel) -> None:
    calls = {"role": "assistant", "tool_calls": [call(1, arguments="[" * 1200)]}
    assert '"[[[' in rendered(text, EAGER, [ASKED, calls, RESULTS[0]])


def test_arguments_are_text_where_templates_join_texts_and_silence_is_no_turn(text: TextModel) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [call(1, arguments='{"city":"Rome"}')]}
    found = rendered(text, JOINS_TEXTS, [ASKED, called, RESULTS[0]])
    assert '<call>{"city": "Rome"}</call><tool>22 degrees' in found
    assert "<assistant>" not in found
    said = rendered(text, JOINS_TEXTS, [ASKED, {**called, "content": "Well."}, RESULTS[0]])
    assert "</call><assistant>Well.<tool>" in said


@pytest.mark.parametrize("arguments", ['{"city": "Ro', "[1]", "null", '"x"'])
def test_a_call_that_was_cut_off_does_not_end_a_conversation(text: TextModel, arguments: str) -> None:
    called = {"role": "assistant", "tool_calls": [call(1, arguments=arguments), call(2, arguments='{"a": 1}')]}
    found = rendered(text, JOINS_MEMBERS, [ASKED, called, RESULTS[0]])
    assert "<call>arguments=" in found and "<call>a=1;</call>" in found
    assert "<call></call>" in rendered(text, JOINS_MEMBERS, [ASKED, {"role": "assistant", "tool_calls": [call(1)]}])


def test_ids_are_such_as_a_template_takes(text: TextModel) -> None:
    found = rendered(text, SHORT_IDS, [ASKED, CALLED, *RESULTS])
    first, second, *results = re.findall(r"\((.{9})\)", found)
    assert first != second and results == [first, second]
    assert rendered(text, SHORT_IDS, [ASKED, CALLED, *RESULTS]) == found
    weather = {"name": "weather", "arguments": "{}"}
    kept = {"role": "assistant", "tool_calls": [{"id": "abcdefgh1", "function": weather}]}
    found = rendered(text, SHORT_IDS, [ASKED, kept, {**RESULTS[0], "tool_call_id": "abcdefgh1"}])
    assert found.count("(abcdefgh1)") == 2
    called = {"role": "assistant", "tool_calls": [{"function": weather}, {"function": weather}]}
    result = {"role": "tool", "content": "5"}
    ids = re.findall(r"\((.{9})\)", rendered(text, SHORT_IDS, [ASKED, called, result, result]))
    assert ids[:2] == ids[2:] and ids[0] != ids[1]


def test_templates_may_ask_whether_there_are_tools_by_whether_they_are_defined(text: TextModel) -> None:
    assert rendered(text, GOES_THROUGH, [ASKED]) == "Rome and Bern?"
    assert "weather" in rendered(text, GOES_THROUGH, [ASKED], tools=TOOLS)


@pytest.mark.parametrize("template", [EAGER, FIRST_ONLY])
def test_several_calls_reach_templates_that_know_one_at_a_time(text: TextModel, template: str) -> None:
    called = {**CALLED, "content": "Well.", "reasoning_content": "Hm."}
    found = rendered(text, template, [ASKED, called, *reversed(RESULTS), ASKED])
    places = [found.index(part) for part in ('"Rome"}', "22 degrees", "{}", "12 degrees")]
    assert places == sorted(places) and found.count("Rome and Bern?") == 2
    assert found.count("Well.") == (template is FIRST_ONLY)
    nameless = {"role": "tool", "content": "same"}
    assert rendered(text, template, [ASKED, CALLED, nameless, nameless]).count("same") == 2
    without = rendered(text, template, [ASKED, CALLED])
    assert '"Rome"}' in without and "{}" in without
