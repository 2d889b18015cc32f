"""Grammars and schemas as people write them, and what the library that compiles them would make of them otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slipstream.engine.errors import RequestError
from slipstream.engine.grammars.compiling import compile_grammar, vocabulary
from slipstream.server.errors import InvalidRequestError
from slipstream.server.structured import choice_grammar, context_free_grammar, json_grammar

BYTES = vocabulary([bytes([byte]) for byte in range(256)], [])


def accepts(grammar: str, text: str) -> bool:
    matcher, tokens = compile_grammar(BYTES, grammar), list(text.encode())
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


GRAMMARS: list[tuple[str, str, str]] = [
    ("?start: word\n?word: /[a-z]+/", "ab", "1"),
    ('root ::= start "x"\nstart ::= "a"', "ax", "a"),
    ('root ::= "a" # one\n  # or\n  | "b"\n  | "#|c"', "#|c", "c"),
    (r'root ::= [\u0041-\u005a]+ "\u00e9\U0001F600"', "AZé😀", "aé😀"),
    (r'root ::= [^\0-\x1f\u007f"\-]+ "\x0a"', "é\n", "a-b\n"),
    ('root ::= aB a-b\naB ::= "x"\na-b ::= "y"', "xy", "x"),
    ('root ::= "start: x"', "start: x", "x"),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), GRAMMARS)
def test_grammars_as_people_write_them(grammar: str, good: str, bad: str) -> None:
    found = context_free_grammar(grammar, "p")
    assert accepts(found, good) and not accepts(found, bad)


def test_a_grammar_in_the_form_of_an_object_is_none() -> None:
    with pytest.raises(InvalidRequestError, match="neither a Lark"):
        context_free_grammar('{\nstart: "a"', "p")


def test_choices_may_be_many_and_odd() -> None:
    many = choice_grammar([f"choice {number}" for number in range(10_000)], "p")
    assert accepts(many, "choice 9999") and not accepts(many, "choice 10000")
    odd = ["", "a", "ab", "a\x7f", 'a"\\', "\n", "é😀", "/a/", "<[1]>"]
    found = choice_grammar(odd, "p")
    assert all(accepts(found, text) for text in odd) and not accepts(found, "abc")


SCHEMAS: list[tuple[dict[str, Any], Any, Any]] = [
    ({"$ref": "#/$defs/Größe <m>", "$defs": {"Größe <m>": {"type": "integer"}}}, 5, "x"),
    ({"type": "string", "pattern": r"^(?=.*\d)[a-z\d]{8,}$"}, "what", 5),
    ({"type": "object", "properties": {"pattern": {"type": "string", "pattern": r"\bx"}}}, {"pattern": "y"}, {"y": 1}),
    ({"type": "object", "patternProperties": {"(?!x)": {"type": "null"}}, "additionalProperties": False}, {}, {"y": 1}),
    ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, {"a": 1}, {"b": 1}),
    ({"type": "object", "unevaluatedProperties": {"type": "null"}}, {"a": None}, {"a": 1}),
    (
        {"type": "object", "properties": {"a": {"type": "string", "enum": None, "default": None}}, "required": None},
        {"a": "x"},
        {"b": 1},
    ),
    ({"type": "object", "properties": None, "additionalProperties": None, "$defs": None}, {"b": 1}, []),
    (
        {"type": "object", "properties": {"default": {"pattern": r"\bx"}, "enum": {"const": None}}},
        {"default": "y", "enum": None},
        {"enum": 1},
    ),
]


@pytest.mark.parametrize(("schema", "good", "bad"), SCHEMAS)
def test_schemas_that_the_library_reads_otherwise(schema: dict[str, Any], good: Any, bad: Any) -> None:
    found = json_grammar(schema, "p", best_effort=True)
    assert accepts(found, json.dumps(good)) and not accepts(found, json.dumps(bad))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "cases of oneOf"),
        ({"type": "array", "uniqueItems": True}, 'cannot be enforced: ["uniqueItems"]'),
        ({"type": "number", "minimum": 2, "maximum": 1}, "minimum (2) is greater than maximum (1)"),
    ],
)
def test_what_is_wrong_with_a_schema_is_one_sentence(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        compile_grammar(BYTES, json_grammar(schema, "p"))
    text = str(refused.value)
    assert text.startswith("the JSON schema cannot be used: ") and said in text
    assert "\n" not in text and "%json" not in text and "coerce" not in text
