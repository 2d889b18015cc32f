"""Taking answers apart: each format as models write it, and the same however the text is cut."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.tools.answer import AnswerParser, Speech
from slipstream.server.tools.formats import FORMATS, recognized
from slipstream.server.tools.parts import CallArguments, CallBegin, Content, Part, Reasoning
from slipstream.server.tools.written import all_written

NAMES = ("get_weather", "add")
Whole = tuple[str, str, list[tuple[str, str]]]


def whole(parts: list[Part]) -> Whole:
    """Reasoning, content and calls; checks that they come in an order that clients understand."""
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    for part in parts:
        match part:
            case Reasoning():
                assert not content and not calls and part.text
                reasoning += part.text
            case Content():
                assert part.text
                content += part.text
            case CallBegin():
                assert part.index == len(calls)
                calls.append((part.name, ""))
            case CallArguments():
                assert part.index == len(calls) - 1 and part.text
                calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return reasoning, content, calls


def parse(speech: Speech, text: str, cuts: list[int] | None = None) -> Whole:
    parser = AnswerParser(speech)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts or ()), len(text)]
    parts: list[Part] = []
    for begin, end in pairwise(places):
        parts += parser.push(text[begin:end])
    return whole(parts + parser.finish())


KINDS = {
    "get_weather": {"city": frozenset(("string",)), "unit": frozenset(("string", "null"))},
    "add": dict.fromkeys("ab", frozenset(("integer",))),
}


def speech(form: str, **fields: Any) -> Speech:
    return Speech(tool_format=form, tool_names=NAMES, kinds=KINDS, **fields)


WEATHER = '{"city": "Paris \\"x\\" }", "days": [1, {"a": "]"}]}'
ADD = '{"a": 1, "b": 2}'
HERMES_ADD = f'<tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call>'
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Just text with < and <tool", "Just text with < and <tool", []),
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>\n'
        f'<tool_call>\n{{"arguments": {ADD}, "name": "add"}}\n</tool_call>\n',
        "Let me see.\n",
        [("get_weather", WEATHER), ("add", ADD)],
    ),
    ("hermes", f'<tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call> Done.', "Done.", [("add", ADD)]),
    ("hermes", f'<tool_call>\n{{"name": "rm", "arguments": {ADD}}}\n</tool_call>', None, []),  # type: ignore[list-item]
    ("hermes", "<tool_call>\nnonsense", "<tool_call>\nnonsense", []),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": ""}', "", [("add", "{}")]),
    ("hermes", f'<tool_call>{{"arguments": {ADD}, "name": "rm"}}</tool_call>', None, []),  # type: ignore[list-item]
    (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call>\nUse <tool_call> no more.',
        "Use <tool_call> no more.",
        [("add", ADD)],
    ),
    (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call>\n<tool_call>{{"name": "rm"}}</tool_call>',
        '<tool_call>{"name": "rm"}</tool_call>',
        [("add", ADD)],
    ),
    ("hermes", f'<tool_call>\n{{"name": "add", "arguments": {ADD}}}\n</tool_c', "", [("add", ADD)]),
    ("hermes", f'<tool_call>\n{{"name": "add", "arguments": {ADD}\n</tool_call>\nDone.', "Done.", [("add", ADD)]),
    (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": {ADD} </tool_call>'
        f'<tool_call>{{"name": "get_weather", "arguments": {WEATHER}}}</tool_call>',
        "",
        [("add", ADD), ("get_weather", WEATHER)],
    ),
    ("hermes", f'<tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call>\n<tool_call>\n{{"na', "", [("add", ADD)]),
    ("json", f'{{"name": "add", "arguments": {ADD}}}\n{{\n  ', "", [("add", ADD)]),
    ("mistral_args", f"[TOOL_CALLS]add[ARGS]{ADD}[TOOL_CALLS]get_w", "", [("add", ADD)]),
    ("llama3_json", f'{{"name": "add", "parameters": {ADD}}}', "", [("add", ADD)]),
    (
        "llama3_json",
        f'<|python_tag|>{{"name": "add", "parameters": {ADD}}}; {{"name": "get_weather", "parameters": {WEATHER}}}',
        "",
        [("add", ADD), ("get_weather", WEATHER)],
    ),
    ("llama3_json", '{"answer": "add"}', '{"answer": "add"}', []),
    ("llama3_json", f'Call {{"name": "add", "parameters": {ADD}}}', f'Call {{"name": "add", "parameters": {ADD}}}', []),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {ADD}}}, {{"name": "get_weather", "arguments": {WEATHER}}}]',
        "",
        [("add", ADD), ("get_weather", WEATHER)],
    ),
    (
        "mistral_args",
        f"Well[TOOL_CALLS]add[ARGS]{ADD}[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{WEATHER}",
        "Well",
        [("add", ADD), ("get_weather", WEATHER)],
    ),
    (
        "mistral_args",
        f"[TOOL_CALLS]add[ARGS]{ADD} And then: [TOOL_CALLS]get_weather[ARGS]{WEATHER}",
        "And then: ",
        [("add", ADD), ("get_weather", WEATHER)],
    ),
    ("mistral_args", f"[TOOL_CALLS]rm[ARGS]{ADD}", f"[TOOL_CALLS]rm[ARGS]{ADD}", []),
    (
        "qwen3_coder",
        'I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nA <b>\n"é"\n\n</parameter>\n<parameter=unit>\n'
        "None\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=b>2</parameter>\n</function>\n</tool_call>",
        "I look.\n",
        [("get_weather", '{"city": "A <b>\\n\\"é\\"\\n", "unit": null}'), ("add", ADD)],
    ),
    ("qwen3_coder", "<tool_call>\n<function=add>\n</function>\n</tool_call> Done.", "Done.", [("add", "{}")]),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=unit>\n5\n</parameter>\n</tool_call>",
        "",
        [("get_weather", '{"unit": "5"}')],
    ),
    ("qwen3_coder", "<tool_call>\n<function=rm>\n</function>\n</tool_call>", None, []),  # type: ignore[list-item]
    ("qwen3_coder", "<tool_call>\n<funny>", "<tool_call>\n<funny>", []),
    # What stands before a call, or between two, is forgotten.
    (
        "qwen3_coder",
        f"I add.\n\n{(bare := '<function=add>' + chr(10) + '<parameter=a>1</parameter></function>')}\n</tool_call>",
        "I add.\n\n",
        [("add", '{"a": 1}')],
    ),
    ("qwen3_coder", f"<tool_call>{bare}\n{bare}</tool_call> Done", "Done", [("add", '{"a": 1}')] * 2),
    ("qwen3_coder", "Say <function=rm> or <function=", "Say <function=rm> or <function=", []),
    ("minimax_m2", 'So\n<invoke name="add">\n</invoke>\n</minimax:tool_call>', "So\n", [("add", "{}")]),
    ("kimi_k2", f"So<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{ADD}", "So", [("add", ADD)]),
    ("deepseek_v31", f"So<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ADD}<｜tool▁call▁end｜>", "So", [("add", ADD)]),
    ("mistral", f'{(one := f"""[TOOL_CALLS][{{"name": "add", "arguments": {ADD}}}]""")}{one}', "", [("add", ADD)] * 2),
    # There is too much of it: a bracket, and the ends of lines in JSON, which they end.
    ("hermes", f'<tool_call>{{"name": "add", "arguments": {ADD}}}}}</tool_call>', "", [("add", ADD)]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\n\t"}}</tool_call>', "", [("add", '{"a": "\\n\\t"}')]),
    ("mistral_args", '[TOOL_CALLS]add[ARGS]{\n"a": "\n"}', "", [("add", '{\n"a": "\\n"}')]),
    (
        "glm45",
        "Well.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome\n</arg_value>\n<arg_key>days</arg_key>"
        "<arg_value>[1, {}]</arg_value>\n</tool_call>\n<tool_call>add\n</tool_call>",
        "Well.\n",
        [("get_weather", '{"city": "Rome\\n", "days": [1, {}]}'), ("add", "{}")],
    ),
    ("glm45", "<tool_call>rm\n</tool_call>", "<tool_call>rm\n</tool_call>", []),
    ("nemotron", f'Ok. <TOOLCALL>[{{"name": "add", "arguments": {ADD}}}]</TOOLCALL>', "Ok. ", [("add", ADD)]),
    ("json", f' [{{"name": "add", "arguments": {ADD}}}]', "", [("add", ADD)]),
    ("json", "[1, 2]", "[1, 2]", []),
    ("json", "No.", "No.", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_formats_as_models_write_them(form: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(speech(form), text) == ("", text if content is None else content, calls)


@pytest.mark.parametrize(
    ("arguments", "has_calls"),
    [(ADD + "}", True), (ADD, True), (ADD + "\n", True), (ADD + "\n</tool_call>", True), (ADD[:-3], False)],
)
def test_an_answer_whose_call_is_all_there_has_called(arguments: str, has_calls: bool) -> None:
    """A model may forget the last bracket; one that was stopped within the arguments has not called."""
    parser = AnswerParser(speech("hermes"))
    for character in f'<tool_call>\n{{"name": "add", "arguments": {arguments}':
        parser.push(character)
    parser.finish()
    assert parser.has_calls is has_calls


pieces = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "<|python_tag|>",
            "<think>",
            "</think>",
            "<function=",
            "</function>",
            "<parameter=",
            "</parameter>",
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
            "get_weather",
            "city",
            "add",
            "rm",
        ),
        *("\n", " ", "{", "}", "[", "]", '"', "\\", ":", ",", ";", "x", "<", "[TOOL", '{"name": "add", "arguments": '),
        *(ADD, WEATHER, ADD + "\n}", '{"name": "add", "parameters": {}}', '"name": "rm"', '"arguments"', "null", "é"),
    ]
)
texts = st.one_of(st.lists(pieces, max_size=12).map("".join), st.sampled_from([text for _, text, _, _ in CASES]))


@given(
    texts,
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.integers(0, 200), max_size=8),
    st.sampled_from([None, "think"]),
    st.sampled_from([None, True, False]),
    st.sampled_from([None, 1]),
)
def test_it_does_not_matter_how_the_text_is_cut(
    text: str, form: str, cuts: list[int], reasoning: str | None, is_open: bool | None, most: int | None
) -> None:
    asked = speech(form, reasoning=reasoning, is_open=is_open, most_calls=most)
    expected = parse(asked, text)
    assert parse(asked, text, cuts) == expected
    assert parse(asked, text, list(range(len(text)))) == expected
    assert len(expected[2]) <= (most or 99)


arguments = st.dictionaries(
    st.text(max_size=4),
    st.recursive(st.integers() | st.text(max_size=6), lambda x: st.lists(x, max_size=2)),
    max_size=3,
)


@given(
    st.sampled_from(sorted(name for name, form in FORMATS.items() if not form.parameter and not form.literal)),
    st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3),
)
def test_what_a_format_writes_it_reads(form: str, calls: list[tuple[str, Any]]) -> None:
    said = [(name, json.dumps(values)) for name, values in calls]
    assert parse(speech(form), all_written(FORMATS[form], said)) == ("", "", said)


tagged = st.fixed_dictionaries({"city": st.text()}, optional={"x": st.integers() | st.lists(st.text(max_size=3))})


@given(
    st.sampled_from(sorted(name for name, form in FORMATS.items() if form.parameter)),
    st.lists(tagged, min_size=1, max_size=3),
)
def test_what_a_format_with_tags_writes_it_reads(form: str, calls: list[dict[str, Any]]) -> None:
    said = [("get_weather", json.dumps(values, ensure_ascii=False)) for values in calls if "</" not in str(values)]
    assert parse(speech(form), all_written(FORMATS[form], said)) == ("", "", said)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nhm\n</think>\n\nYes", None, ("hm", "Yes", [])),
        ("hm</think>Yes", True, ("hm", "Yes", [])),
        ("Yes <think>", None, ("", "Yes <think>", [])),
        ("Yes</think>", False, ("", "Yes</think>", [])),
        ("cut off", True, ("cut off", "", [])),
        (
            f'<think>a</think><tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call>',
            None,
            ("a", "", [("add", ADD)]),
        ),
        # Calls that the model has not ended its reasoning for, and such as it only thinks of.
        (f"hm\n{(call := HERMES_ADD)}\n", True, ("hm", "", [("add", ADD)])),
        (f"hm {call}\n{call}</think>\n", True, ("hm", "", [("add", ADD)] * 2)),
        (f"hm {call} no {call}", True, (f"hm {call} no", "", [("add", ADD)])),
        (f"hm {call} no</think>", True, (f"hm {call} no", "", [])),
        (f"hm {call}</think>Yes", True, (f"hm {call}", "Yes", [])),
        (f"hm {call}</think>{call}", True, (f"hm {call}", "", [("add", ADD)])),
        (f"a <tool_call> is <tool_call>{call[11:30]}", True, (f"a <tool_call> is <tool_call>{call[11:30]}", "", [])),
    ],
)
def test_reasoning(text: str, is_open: bool | None, expected: Whole) -> None:
    assert parse(speech("hermes", reasoning="think", is_open=is_open), text) == expected


def test_where_a_grammar_tells_of_calls_there_are_no_others() -> None:
    text = "<function=add>\n</function>"
    assert parse(speech("qwen3_coder", by_grammar=True), text) == ("", text, [])
    asked = speech("hermes", reasoning="think", is_open=True, by_grammar=True)
    assert parse(asked, HERMES_ADD) == (HERMES_ADD, "", [])


def test_what_may_be_a_call_in_reasoning_takes_no_long_time() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": "' + "<tool_call>x" * 4000 + '"}} no'
    asked = speech("hermes", reasoning="think", is_open=True)
    started = time.process_time()
    assert parse(asked, text, list(range(0, len(text), 3))) == (text, "", [])
    assert time.process_time() - started < 5


def test_templates_tell_the_format() -> None:
    assert recognized("{{ '<tool_call>' }}").name == "hermes"
    assert recognized("<tool_call>\n<function={{ name }}>\n<parameter={{ key }}>").name == "qwen3_coder"
    assert recognized("<tool_call>{{ name }}<arg_key>").name == "glm45"
    assert recognized("Environment: ipython").name == "llama3_json"
    assert recognized("{{ '[TOOL_CALLS]' }}").name == "mistral"
    assert recognized("[TOOL_CALLS]{{ name }}[ARGS]").name == "mistral_args"
    assert recognized("plain").name == "json"
    assert (
        len({FORMATS["mistral"].new_id("add", 0) for _ in range(9)}) == 9
        and len(FORMATS["mistral"].new_id("add", 0)) == 9
    )


def harmony(text: str) -> str:
    """Tags without the signs around them, to be read more easily."""
    return re.sub(r"@(\w+)", r"<|\1|>", text)


CHANNELS: list[tuple[str, Whole, bool]] = [
    ("@channel analysis@message Hm. <@end@start assistant@channel final@message Yes.", ("Hm. <", "Yes.", []), False),
    ("@channel final@message Yes.@return", ("", "Yes.", []), False),
    (
        "@channel analysis@message Hm@end@start assistant@channel commentary to=functions.add @constrain json@message "
        + ADD,
        ("Hm", "", [("add", ADD)]),
        True,
    ),
    (
        "@channel commentary@message Let me see.@end@start assistant to=functions.add@channel commentary json@message "
        f"{ADD}@call@start assistant@channel commentary to=functions.get_weather@message @call",
        ("", "Let me see.", [("add", ADD), ("get_weather", "{}")]),
        True,
    ),
    ('@channel commentary to=functions.add @constrain json@message {"a": 1', ("", "", [("add", '{"a": 1')]), False),
    ("@channel commentary to=functions.rm@message {}@call", ("", "{}", []), False),
    ("@channel analysis@message cut off", ("cut off", "", []), False),
    ("@channel analy", ("", "", []), False),
    ("No channels, but <@end.", ("", "No channels, but <@end.", []), False),
    (f'{{"name": "add", "arguments": {ADD}}}', ("", "", [("add", ADD)]), True),
]


@pytest.mark.parametrize(("text", "expected", "has_calls"), CHANNELS)
def test_channels(text: str, expected: Whole, has_calls: bool) -> None:
    asked = speech("json", reasoning="harmony")
    text = harmony(text).replace("|> ", "|>")
    expected = (harmony(expected[0]), harmony(expected[1]), expected[2])
    assert parse(asked, text) == expected
    assert parse(asked, text, list(range(len(text)))) == expected
    parser = AnswerParser(asked)
    parser.push(text)
    parser.finish()
    assert parser.has_calls is has_calls


def test_calls_on_channels_beyond_the_first_are_left_out_where_one_is_asked_for() -> None:
    one = (
        harmony("@start assistant to=functions.add@channel commentary@message ").replace("|> ", "|>") + ADD + "<|call|>"
    )
    assert parse(speech("json", reasoning="harmony", most_calls=1), one + one) == ("", "", [("add", ADD)])
