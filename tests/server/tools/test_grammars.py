"""Grammars for calls of tools: what a format writes they allow, and what they allow is read as calls that fit."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import numpy as np
import pytest

from slipstream.engine.errors import RequestError
from slipstream.engine.grammars.compiling import compile_grammar, vocabulary
from slipstream.server.structured import JSON_OPTIONS, after_reasoning, json_grammar
from slipstream.server.tools.answer import Speech
from slipstream.server.tools.formats import FORMATS, ToolFormat
from slipstream.server.tools.grammar import Tool, calls_grammar
from slipstream.server.tools.tagged import kinds_of_arguments
from slipstream.server.tools.written import all_written
from tests.server.tools.test_parsers import parse

SPECIAL = {"[TOOL_CALLS]": 256, "[ARGS]": 257, "<|python_tag|>": 258, "</think>": 259}
TOKENS = vocabulary(
    [bytes([byte]) for byte in range(256)] + [text.encode() for text in SPECIAL], sorted(SPECIAL.values())
)
TOOLS = [
    Tool("get_weather", {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
                         "additionalProperties": False, "$defs": {"City": {"enum": ["Rome", "Bern"]}}}, strict=True),
    Tool("add", {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
                 "required": ["a"], "additionalProperties": False}),
]  # fmt: skip
NAMES = tuple(tool.name for tool in TOOLS)
GOOD = [("get_weather", '{"city": "Rome"}'), ("add", '{"a": 3}')]


def symbols_of(form: ToolFormat, special: bool) -> Any:
    def symbols(text: str) -> str:
        for name, token in SPECIAL.items() if special else ():
            if name in text:
                before, _, after = text.partition(name)
                return " ".join(filter(None, [symbols(before), f"<[{token}]>", symbols(after)]))
        return json.dumps(text) if text else ""

    return symbols


def tokens_of(text: str, special: bool) -> list[int]:
    for name, token in SPECIAL.items() if special else ():
        if name in text:
            before, _, after = text.partition(name)
            return [*tokens_of(before, special), token, *tokens_of(after, special)]
    return list(text.encode())


def accepts(grammar: str, text: str, special: bool) -> bool:
    matcher = compile_grammar(TOKENS, grammar)
    tokens = tokens_of(text, special)
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


def grammar_of(form: ToolFormat, special: bool, answer: str | None, parallel: bool = True) -> str:
    return calls_grammar(form, TOOLS, symbols_of(form, special), answer=answer, parallel=parallel, param="tools")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_are_allowed_as_they_are_written_and_no_others(name: str, special: bool) -> None:
    form = FORMATS[name]
    one, two, wrong = (all_written(form, calls) for calls in (GOOD[:1], GOOD, [("add", '{"b": 1}')]))
    cut = one[: len(one) // 2]
    required = grammar_of(form, special, None)
    single = grammar_of(form, special, None, parallel=False)
    lazy = grammar_of(form, special, "")
    either = grammar_of(
        form,
        special,
        json_grammar({"type": "object", "properties": {"x": {"type": "null"}}, "additionalProperties": False}, "p"),
    )
    for text, allowed in [
        (one, "rsle"),
        (two, "rle"),
        (wrong, ""),
        (cut, ""),
        ("Hello. (1 < 2)", "l"),
        ('{"x":null}', "e"),
    ]:
        for key, grammar in zip("rsle", [required, single, lazy, either], strict=True):
            if text == '{"x":null}' and key == "l" and (not form.is_bare or form.header):
                continue  # any text
            assert accepts(grammar, text, special) == (key in allowed), (key, text)
    if not form.is_bare:
        assert accepts(lazy, "Let me see. " + one, special)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_is_sampled_is_read_as_calls_that_fit(name: str) -> None:
    form, random = FORMATS[name], Random(0)
    compiled = compile_grammar(TOKENS, grammar_of(form, True, None))
    seen = set()
    for _ in range(10):
        matcher, said = compiled.deep_copy(), b""
        for _ in range(2000):
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
            token = random.choice([bit for bit in bits.tolist() if bit not in (9, 10, 13, 32)] or bits.tolist())
            if token >= 256 + len(SPECIAL):
                break
            matcher.consume_token(token)
            said += bytes([token]) if token < 256 else next(t for t, i in SPECIAL.items() if i == token).encode()
        kinds = {tool.name: kinds_of_arguments(tool.parameters) for tool in TOOLS}
        _, content, calls = parse(Speech(tool_format=name, tool_names=NAMES, kinds=kinds), said.decode())
        assert content == "" and calls
        for tool, values in calls:
            found = json.loads(values)
            assert found in ({"city": "Rome"}, {"city": "Bern"}) if tool == "get_weather" else 0 <= found["a"] <= 9
        seen.add(len(calls))
    assert len(seen) > 1 or "\n" in form.separator + form.after


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("inner", ["json", "hermes", "both"])
def test_reasoning_comes_before_what_a_grammar_asks_for(inner: str, special: bool) -> None:
    answer = json_grammar({"enum": [1]}, "p")
    grammar = {
        "json": answer,
        "hermes": grammar_of(FORMATS["hermes"], special, None),
        "both": grammar_of(FORMATS["hermes"], special, answer),
    }[inner]
    text = "1" if inner == "json" else all_written(FORMATS["hermes"], GOOD)
    end = symbols_of(FORMATS["hermes"], special)("</think>")
    for is_open, reasoned, bare in ((True, "hm {</think>\n\n", False), (False, "<think>hm 1</think>", True)):
        whole = after_reasoning(grammar, '"<think>"', end, is_open)
        assert accepts(whole, reasoned + text, special)
        assert accepts(whole, text, special) == bare
        assert not accepts(whole, reasoned + "x", special)


def test_options_stand_in_every_schema() -> None:
    assert grammar_of(FORMATS["json"], False, None).count(json.dumps(JSON_OPTIONS["whitespace_pattern"])) == len(TOOLS)


NAMED = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"$ref": "#number"}}, "required": ["a", "b"]}
DEFINED = {"a": {"type": "integer"}, "b": {"$anchor": "number", "type": "number"}}
ADDRESSED = {"$id": "https://example.com/tool.json", **NAMED, "$defs": DEFINED}


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("schema", [ADDRESSED, {**NAMED, "$defs": DEFINED}])
def test_references_hold_wherever_a_schema_stands(name: str, schema: dict[str, Any]) -> None:
    form = FORMATS[name]
    grammar = calls_grammar(
        form, [Tool("f", schema)], symbols_of(form, True), answer=None, parallel=True, param="tools"
    )
    assert accepts(grammar, all_written(form, [("f", '{"a": 1, "b": 0.5}')]), True)
    assert not accepts(grammar, all_written(form, [("f", '{"a": "x", "b": 0.5}')]), True)


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45"])
def test_arguments_between_tags_follow_their_schemas_and_texts_are_free(name: str) -> None:
    properties = {"t": {"type": "string"}, "o": {"type": "object", "properties": {"x": {"type": "null"}}}, "a/b": {}}
    tool = Tool("f", {"type": "object", "properties": properties, "required": ["t"]})
    form, kinds = FORMATS[name], {"f": kinds_of_arguments(tool.parameters)}
    grammar = calls_grammar(form, [tool], symbols_of(form, True), answer=None, parallel=True, param="tools")
    for text in (
        '{"t": "a <b>\\n\\"é\\" </"}',
        '{"t": "5", "o": {"x": null}, "a/b": [1, "x"]}',
        '{"t": "", "a/b": "é"}',
    ):
        said = all_written(form, [("f", text)])
        assert accepts(grammar, said, True)
        found = parse(Speech(tool_format=name, tool_names=("f",), kinds=kinds), said)
        assert found == ("", "", [("f", text)])
    for text in ('{"o": {}}', '{"t": "x", "o": {"y": 1}}', '{"t": "x", "o": 5}', '{"t": "x", "y": 5}'):
        assert not accepts(grammar, all_written(form, [("f", text)]), True)


WRONG = {"type": "object", "$comment": "ours", "properties": {"x": {"type": "nonsense"}}}


@pytest.mark.parametrize("answer", [None, json_grammar({"type": "object"}, "p")])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_is_wrong_with_a_schema_is_said_with_the_name_of_its_tool(name: str, answer: str | None) -> None:
    tools = [*TOOLS, Tool("search.all", WRONG), Tool("rm", {"type": "object"})]
    symbols = symbols_of(FORMATS[name], True)
    grammar = calls_grammar(FORMATS[name], tools, symbols, answer=answer, parallel=True, param="tools")
    with pytest.raises(
        RequestError, match=r"the JSON schema of the tool search\.all cannot be used: Invalid type: nons"
    ):
        compile_grammar(TOKENS, grammar)
