"""Calls and reasoning as the models of many families write them, and as the templates of these tell of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.tools import reasoning
from slipstream.server.tools.answer import AnswerParser
from slipstream.server.tools.formats import FORMATS, ToolFormat, recognized
from slipstream.server.tools.written import all_written
from tests.server.tools.test_parsers import ADD, NAMES, Whole, parse, speech, whole

CITY = '{"city": "Köln\\n\\"x\\""}'
BOTH = [("get_weather", CITY), ("add", ADD)]
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    (
        "deepseek_v3",
        "Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{CITY}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{ADD}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Well.",
        BOTH,
    ),
    (
        "deepseek_v31",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{CITY}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ADD}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        BOTH,
    ),
    (
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Köln\n'
        '"x"</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="add">\n'
        '<｜DSML｜parameter name="a" string="false">1'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="b" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        "",
        BOTH,
    ),
    (
        "kimi_k2",
        "Ok<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{CITY}<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{ADD}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "Ok",
        BOTH,
    ),
    (
        "command_a",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
        f'{CITY}}},\n    {{"tool_call_id": "1", "tool_name": "add", "parameters": {ADD}}}\n]<|END_ACTION|>',
        "",
        BOTH,
    ),
    ("command_r", f'Action: ```json\n[\n  {{"tool_name": "add", "parameters": {ADD}}}\n]```', "", [("add", ADD)]),
    ("glm4", f"get_weather\n{CITY}<|assistant|>add\n{ADD}", "", BOTH),
    ("glm4", "add them yourself", "add them yourself", []),
    ("glm4", "\nOn get_weather\n{}", "\nOn get_weather\n{}", []),
    (
        "olmo3",
        f"I look.\n<function_calls>\nget_weather(city={CITY[9:-1]})\nadd(a=1, b=2)\n</function_calls>",
        "I look.\n",
        BOTH,
    ),
    ("olmo3", "<function_calls>rm(a=1)</function_calls>", "<function_calls>rm(a=1)</function_calls>", []),
    ("olmo3", "<function_calls>add(1, 2)</function_calls>", "<function_calls>add(1, 2)</function_calls>", []),
    ("lfm2", "<|tool_call_start|>[get_weather(city='Köln\\n\"x\"'), add(a=1, b=2)]<|tool_call_end|>Ok", "Ok", BOTH),
    ("pythonic", "[get_weather(city='Köln\\n\"x\"'), add(a = 1,b=2,)]", "", BOTH),
    ("pythonic", "<|python_start|>[add(a=1, b=2)]<|python_end|>", "", [("add", ADD)]),
    ("pythonic", "add(a=1, b=2)", "", [("add", ADD)]),
    ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
    ("pythonic", "add (or not)", "add (or not)", []),
    ("llama4_json", f'<|python_start|>{{"name": "add", "parameters": {ADD}}}<|python_end|>', "", [("add", ADD)]),
    ("phi4_mini", f'<|tool_call|>[{{"name": "add", "arguments": {ADD}}}]<|/tool_call|>', "", [("add", ADD)]),
    (
        "phi4_mini",
        f'<|tool_call|>{{"name": "get_weather", "arguments": {CITY}}}<|/tool_call|>'
        f'<|tool_call|>{{"name": "add", "arguments": {ADD}}}<|/tool_call|>',
        "",
        BOTH,
    ),
    ("phi4_mini", f'functools[{{"name": "add", "arguments": {ADD}}}]', "", [("add", ADD)]),
    ("granite", f'<|tool_call|>[{{"name": "add", "arguments": {ADD}}}]', "", [("add", ADD)]),
    ("granite", f'<tool_call>[{{"name": "add", "arguments": {ADD}}}]', "", [("add", ADD)]),
    (
        "jamba",
        f'<tool_calls>[\n    {{"name": "get_weather", "arguments": {CITY}}},\n    '
        f'{{"name": "add", "arguments": {ADD}}}\n]'
        "</tool_calls>",
        "",
        BOTH,
    ),
    (
        "internlm",
        f'<|action_start|><|plugin|>\n{{"name": "add", "parameters": {ADD}}}<|action_end|>',
        "",
        [("add", ADD)],
    ),
    (
        "minimax_m2",
        'So:\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Köln\n"x"'
        '</parameter>\n</invoke>\n<invoke name="add">\n<parameter name="a">1</parameter>\n'
        '<parameter name="b">2</parameter>\n</invoke>\n</minimax:tool_call>',
        "So:\n",
        BOTH,
    ),
    (
        "seed_oss",
        '<seed:tool_call>\n<function=get_weather>\n<parameter=city>Köln\n"x"</parameter>\n</function>\n</seed:tool_call>'
        "\n<seed:tool_call>\n<function=add>\n<parameter=a>1</parameter>\n<parameter=b>2</parameter>\n</function>\n"
        "</seed:tool_call>",
        "",
        BOTH,
    ),
    (
        "functiongemma",
        '<start_function_call>call:get_weather{city:<escape>Köln\n"x"<escape>}<end_function_call>'
        "<start_function_call>call:add{a:1,b:2}<end_function_call>",
        "",
        BOTH,
    ),
    (
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Köln\n"x"<|"|>}<tool_call|><|tool_call>call:add{a:1,b:2}<tool_call|>',
        "",
        BOTH,
    ),
    ("apertus", f'<|tools_prefix|>[{{"get_weather": {CITY}}}, {{"add": {ADD}}}]<|tools_suffix|>', "", BOTH),
    (
        "longcat",
        f'<longcat_tool_call>\n{{"name": "add", "arguments": {ADD}}}\n</longcat_tool_call>',
        "",
        [("add", ADD)],
    ),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_as_models_write_them(form: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(speech(form), text) == ("", content, calls)
    assert parse(speech(form), text, list(range(len(text)))) == ("", content, calls)
    assert all(json.loads(arguments) for _, arguments in calls)


def test_a_call_behind_one_that_breaks_off_is_found_however_it_comes() -> None:
    """Its first character could have begun a value of the one before."""
    for form, broken in (("functiongemma", "call:add{a:"), ("gemma4", "call:add{a:")):
        [text] = [text for name, text, _, calls in CASES if name == form and calls == BOTH]
        text = FORMATS[form].begin + broken + text
        found = parse(speech(form), text)
        assert [name for name, _ in found[2]][-2:] == ["get_weather", "add"]
        assert parse(speech(form), text, list(range(len(text)))) == found


pieces = st.sampled_from(
    [
        *"()='\",:[]{} \n1",
        *('"""', "\\", "\\n", "\\u00e9", "\\x41", "-2.5"),
        *("None", "true", "007", "x", "city", "add(", "get_weather(city=", "call:add{a:", "<escape>", '<|"|>', "é"),
        *("functions.add:0", "add\n", "```json\n", "<｜tool▁sep｜>", "<|tool_call_begin|>", '"add": '),
        *('<invoke name="add">', '<parameter name="a">', "</parameter>", ' string="true">', "<function=add>", ADD),
    ]
)
marks = {name: [*form.begins, *form.call, form.after, *form.loose] for name, form in FORMATS.items()}


@given(st.data(), st.sampled_from(sorted(FORMATS)), st.lists(st.integers(0, 200), max_size=8))
def test_it_does_not_matter_how_the_text_is_cut(data: Any, form: str, cuts: list[int]) -> None:
    own = st.sampled_from([mark for mark in marks[form] if mark])
    text = "".join([FORMATS[form].begin, *data.draw(st.lists(st.one_of(pieces, own), max_size=14))])
    text += data.draw(st.sampled_from(["", *(case for name, case, _, _ in CASES if name == form)]))
    expected = parse(speech(form), text)
    assert parse(speech(form), text, cuts) == expected
    assert parse(speech(form), text, list(range(len(text)))) == expected


LITERAL = sorted(name for name, form in FORMATS.items() if form.literal)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)

named = st.dictionaries(st.text(max_size=4), values, max_size=3)


@given(
    st.sampled_from(LITERAL),
    st.lists(st.tuples(st.sampled_from(NAMES), named), min_size=1, max_size=3),
)
def test_what_is_written_as_literals_is_read(form: str, calls: list[tuple[str, Any]]) -> None:
    said = [(name, json.dumps(arguments)) for name, arguments in calls]
    if '<|"|>' in str(calls):
        return
    _, content, found = parse(speech(form), all_written(FORMATS[form], said))
    assert content == "" and [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("'it\\'s'", "it's"),
        ('"""a "quoted" text"""', 'a "quoted" text'),
        ("''", ""),
        ("'\\x41\\u00e9\\U0001f600\\q'", "Aé😀\\q"),
        ("(1, 2)", [1, 2]),
        ("[1, [True, None,],]", [1, [True, None]]),
        ("{'a': {1: 'x'}}", {"a": {"1": "x"}}),
        ("0x10", 16),
        ("1_000", 1000),
        (".5", 0.5),
        ("007", "007"),
        ("celsius", "celsius"),
        ("nan", "nan"),
    ],
)
def test_values_of_python_become_json(said: str, value: Any) -> None:
    [(_, arguments)] = parse(speech("olmo3"), f"<function_calls>add(a={said})</function_calls>")[2]
    assert json.loads(arguments) == {"a": value}


TELLS = {
    "{{ '<seed:tool_call>' }} <parameter=": "seed_oss",
    "{%- set b = '<minimax:tool_call>' %}<parameter name=": "minimax_m2",
    "'<｜tool▁calls▁begin｜>' ... '\n```json'": "deepseek_v3",
    "'<｜tool▁calls▁begin｜>' ...": "deepseek_v31",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "<|START_ACTION|>": "command_a",
    "write 'Action:' followed by tool_name": "command_r",
    "<|observation|>": "glm4",
    "<|observation|><arg_key>": "glm45",
    "<function_calls>": "olmo3",
    "<|tool_list_start|>": "lfm2",
    "[func_name1(params_name1=params_value1)]": "pythonic",
    "<|python_start|>": "llama4_json",
    "{{ '<|im_system|>tool_declare<|im_middle|>' }}": "kimi_k2",
    "<|tool|>": "phi4_mini",
    "<|tool|> <|tool_call|>": "phi4_mini",
    "<|tool_call|>": "granite",
    "<tool_call> <|tool_call|>": "hermes",
    "<tool_calls>": "jamba",
    "within <tool_call></tool_call>: <tool_calls>[": "jamba",
    "<|action_start|>": "internlm",
    "<start_function_call>": "functiongemma",
    "<|tool_call>": "gemma4",
    "<|tools_prefix|>": "apertus",
}


@pytest.mark.parametrize(("template", "form"), TELLS.items())
def test_templates_tell_the_format(template: str, form: str) -> None:
    assert recognized(template).name == form


def test_ids_go_on_counting_where_a_model_knows_its_calls_by_them() -> None:
    assert speech("kimi_k2", calls_before=2).new_id("add", 1) == "functions.add:3"


@pytest.mark.parametrize(
    ("tags", "text", "expected"),
    [
        (
            "command",
            "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>",
            ("Hm.", "Yes.", []),
        ),
        ("command", "<|START_RESPONSE|>Yes.<|END_RESPONSE|>", ("", "Yes.", [])),
        ("gemma4", "<|channel>thought\nHm.\n<channel|>Yes.", ("Hm.", "Yes.", [])),
        ("granite", "Here is my thought process: Hm.\n\nHere is my response: Yes.", ("Hm.", "Yes.", [])),
        ("apertus", "<|inner_prefix|>Hm.<|inner_suffix|>Yes.", ("Hm.", "Yes.", [])),
        ("think", "<think>a \n\n b\n</think>\n\nYes <", ("a \n\n b", "Yes <", [])),
        ("think", "\n\n <thin", ("", "\n\n <thin", [])),
    ],
)
def test_reasoning_of_families(tags: str, text: str, expected: Whole) -> None:
    asked = speech("hermes", reasoning=tags)
    assert parse(asked, text) == expected
    assert parse(asked, text, list(range(len(text)))) == expected


def test_a_line_that_ends_in_a_template_ends_in_a_tag() -> None:
    assert reasoning.recognized("{{ '<|channel>thought\\n<channel|>' }}") == "gemma4"


def held(value: Any, seen: set[int]) -> int:
    """The characters of the longest text that an object has, in whatever it consists of but lists."""
    if isinstance(value, str):
        return len(value)
    if id(value) in seen or not hasattr(value, "__dict__"):
        return 0
    seen.add(id(value))
    return max((held(each, seen) for each in vars(value).values()), default=0)


LONG = "ab \\\\ c, d: " * 3000


def long_text(shape: str, form: ToolFormat) -> str:
    head, middle, _ = form.call
    match shape:
        case "an argument":
            return all_written(form, [("get_weather", json.dumps({"city": LONG}))])
        case "one that is no text":
            return all_written(form, [("add", json.dumps({"a": [[1, 2]] * 9000}))])
        case "one whose tool is named last":
            return f'{form.begin}{{"arguments": {{"a": "{LONG}"}}, "name": "add"}}'
        case "white space":
            return form.begin + " \n" * 20_000 + "x"
        case "white space before":
            return " \n" * 20_000 + form.begin
        case "what never becomes a call":
            return form.begin + head + "get_weather" + "x" * 30_000
        case "what never becomes a key":
            return form.begin + head + "add" + middle + (form.parameter or ("",))[0] + "x" * 30_000
    return "<[ " * 10_000


SHAPES = (
    *("an argument", "one that is no text", "one whose tool is named last", "white space", "white space before"),
    *("what never becomes a call", "what never becomes a key", "text"),
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_the_work_for_a_piece_does_not_grow_with_what_came_before(form: str, shape: str) -> None:
    """Each piece is looked at with what is held back of those before, as a text; so that has to stay short."""
    text = long_text(shape, FORMATS[form])
    parser = AnswerParser(speech(form, reasoning="think"))
    parts, longest = [], 0
    for at in range(0, len(text), 50):
        parts += parser.push(text[at : at + 50])
        longest = max(longest, held(parser, set()))
    assert longest <= 700
    assert whole([*parts, *parser.finish()]) == parse(speech(form, reasoning="think"), text)


@pytest.mark.parametrize("text", ["<think>" + " \n" * 20_000, " \n" * 20_000, "<think>" + "<" * 20_000])
@pytest.mark.parametrize("tags", sorted(reasoning.TAGS))
def test_reasoning_holds_back_little(tags: str, text: str) -> None:
    parser = AnswerParser(speech("json", reasoning=tags))
    longest = 0
    for at in range(0, len(text), 50):
        parser.push(text[at : at + 50].replace("<think>", reasoning.TAGS[tags].begin))
        longest = max(longest, held(parser, set()))
    assert longest <= 700
