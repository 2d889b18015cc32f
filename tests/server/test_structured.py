"""Answers with a structure over HTTP: what may be asked for, what comes, and what is refused with a sentence."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.server.errors import InvalidRequestError
from slipstream.server.structured import choice_grammar, closed, context_free_grammar, json_grammar, regex_grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


def check_person(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "age", "tags"]
    assert re.fullmatch("[a-z]{1,8}", found["name"]) and 0 <= found["age"] <= 99
    assert set(found["tags"]) <= {"red", "green"} and len(found["tags"]) <= 2


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.5, "seed": 3, "frequency_penalty": 1.0}])
def test_json_schema_in_every_spelling(server: Any, fields: dict[str, Any]) -> None:
    spellings: list[dict[str, Any]] = [
        {"response_format": NAMED},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}},
        {"response_format": {"type": "json_object", "schema": PERSON}},
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": json.dumps(PERSON), "disable_any_whitespace": True}},
        {"guided_json": PERSON, "guided_whitespace_pattern": " ?", "guided_decoding_backend": "auto"},
        {"response_format": {"type": "json_schema", "schema": PERSON}},
        {"response_format": {"type": "json", "value": PERSON}},
        {"json_schema": PERSON, "grammar": ""},
        {"json_schema": json.dumps(PERSON)},
    ]
    for spelling in spellings:
        [choice] = server.chat(max_tokens=200, **spelling, **fields)["choices"]
        assert choice["finish_reason"] == "stop"
        check_person(choice["message"]["content"])
        [choice] = server.complete("A person:", max_tokens=200, **spelling, **fields)["choices"]
        check_person(choice["text"])
    [choice] = server.chat(max_tokens=200, structured_outputs=spellings[4]["structured_outputs"], **fields)["choices"]
    assert not re.search(r"\s", choice["message"]["content"])


FLAG = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}


def test_properties_that_nobody_named_are_not_made_up(server: Any) -> None:
    asked: dict[str, Any] = {"n": 8, "max_tokens": 400, "temperature": 2.0, "seed": 1}
    texts = [each["text"] for each in server.complete("x", **asked, structured_outputs={"json": FLAG})["choices"]]
    assert all(json.loads(text).keys() == {"a"} for text in texts), texts
    tool = {"type": "function", "function": {"name": "set", "parameters": FLAG}}
    for choice in server.chat(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False)["choices"]:
        [call] = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]).keys() == {"a"}
    allowed = {**FLAG, "additionalProperties": {"type": "null"}, "minProperties": 1}
    texts = [each["text"] for each in server.complete("x", **asked, structured_outputs={"json": allowed})["choices"]]
    assert any(text.count("null") for text in texts), texts


NOT_CLOSED: list[dict[str, Any]] = [
    {"type": "object"},
    {"properties": {"a": {}}, "additionalProperties": True},
    {"properties": {"a": {}}, "patternProperties": {"^b": {}}},
    {"properties": {"a": {}}, "required": ["b"]},
    {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]},
    {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
    {"$ref": "#/$defs/all", "$defs": {"all": {"allOf": [{"$ref": "#/$defs/a"}]}, "a": {"properties": {"a": {}}}}},
    {"properties": 5, "items": [1], "$defs": [], "anyOf": {"properties": {}}},
    {"properties": {"a": {}}, "required": [["a"]]},
    {"enum": [{"properties": {}}], "default": {"properties": {}}},
]


@pytest.mark.parametrize("schema", NOT_CLOSED)
def test_a_schema_that_says_what_else_there_may_be_stays_as_it_is(schema: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert closed(schema) == schema
    assert json.dumps(schema) == before


def test_objects_are_closed_wherever_they_stand() -> None:
    one: dict[str, Any] = {"properties": {"properties": {"type": "null"}}}
    end = {"additionalProperties": False}
    for around in (
        lambda inner: {"items": inner},
        lambda inner: {"prefixItems": [{}, inner]},
        lambda inner: {"anyOf": [inner, {"type": "null"}]},
        lambda inner: {"properties": {"x": inner}} | end,
        lambda inner: {"additionalProperties": inner},
        lambda inner: {"$ref": "#/$defs/x", "$defs": {"x": inner}},
    ):
        assert closed(around(one)) == around(one | end)
    assert one.keys() == {"properties"}


def test_a_pattern_that_cannot_be_enforced_is_refused_where_it_has_to_be(server: Any) -> None:
    body = {"prompt": "x", "max_tokens": 5, "structured_outputs": {"json": {"type": "string", "pattern": "(?=a)b"}}}
    status, reply = server.post("/v1/completions", body)
    assert status == 400 and "look-around" in reply["error"]["message"]


def test_an_empty_pattern_for_blanks_allows_none(server: Any) -> None:
    asked = {"guided_json": PERSON, "guided_whitespace_pattern": ""}
    [choice] = server.complete("A person:", max_tokens=200, seed=1, temperature=1.5, **asked)["choices"]
    assert not re.search(r"\s", choice["text"])


def test_choices_regular_expressions_and_grammars(server: Any) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({"choice": ["positive", "negative", 'with "quotes" and \\ é']}, r'positive|negative|with "quotes" and \\ é'),
        ({"regex": r"^\d{3}-[a-f]{1,4}(\.|\$)$"}, r"\d{3}-[a-f]{1,4}(\.|\$)"),
        ({"regex": r"cost: \d\$"}, r"cost: \d\$"),
        ({"grammar": 'start: "SELECT " COLUMN\nCOLUMN: "a" | "b"'}, "SELECT [ab]"),
        ({"grammar": 'root ::= "yes" | no\nno ::= "n" [o]{1,3}'}, "yes|no{1,3}"),
    ]
    for structure, expected in asked:
        for temperature in (0, 1.3):
            structured = {"structured_outputs": structure}
            [choice] = server.complete("x", max_tokens=60, seed=1, temperature=temperature, **structured)["choices"]
            assert re.fullmatch(expected, choice["text"]), (structure, choice)
            assert choice["finish_reason"] == "stop"
            name, value = next(iter(structure.items()))
            again = server.complete("x", max_tokens=60, seed=1, temperature=temperature, **{f"guided_{name}": value})
            assert again["choices"][0]["text"] == choice["text"]
    for fields in (
        *({name: 'root ::= "ab" [c]'} for name in ("grammar", "ebnf")),
        {"regex": "abc"},
        *({"response_format": {"type": "regex", name: "abc"}} for name in ("pattern", "value")),
        {"response_format": {"type": "grammar", "grammar": 'root ::= "abc"'}},
    ):
        assert server.complete("x", max_tokens=9, **fields)["choices"][0]["text"] == "abc"
    for object_ in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        [choice] = server.chat(max_tokens=30, **object_)["choices"]
        assert choice["message"]["content"].startswith("{")


def test_streams_choices_and_log_probabilities_say_what_the_whole_answer_says(server: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "Who?"}],
        "response_format": NAMED,
        **{"n": 3, "seed": 5, "temperature": 1.2, "max_tokens": 200, "logprobs": True, "top_logprobs": 2},
    }
    status, whole = server.post("/v1/chat/completions", body)
    assert status == 200
    texts = [""] * 3
    for event in server.events("/v1/chat/completions", body)[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    for choice in whole["choices"]:
        check_person(choice["message"]["content"])
        tokens = choice["logprobs"]["content"]
        assert "".join(token["token"] for token in tokens[:-1]) == choice["message"]["content"]


def test_near_max_tokens_an_answer_is_brought_to_its_end_and_says_so(server: Any) -> None:
    listed = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    schema = {"type": "object", "properties": {"said": listed}, "required": ["said"], "additionalProperties": False}
    asked: dict[str, Any] = {"structured_outputs": {"json": schema}, "max_tokens": 30, "temperature": 2.0, "n": 4}
    choices = server.chat(seed=1, **asked)["choices"]
    for choice in choices:
        assert json.loads(choice["message"]["content"])["said"]
        assert choice["finish_reason"] == "stop"
    assert "max_tokens" in {choice["stop_reason"] for choice in choices}
    [choice] = server.chat(**asked | {"max_tokens": 2, "n": 1})["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None), "there is no time for any end"
    [choice] = server.chat(structured_outputs={"choice": ["yes"]}, max_tokens=9)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None), "nothing was left out"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"regex": "[0-9]+"}, "[0-9]+"),
        ({"json": {"type": "integer"}}, "-?[0-9]+"),
        ({"grammar": 'start: /[a-z]+/ ("," /[a-z]+/)*'}, "[a-z]+(,[a-z]+)*,?"),
    ],
)
@pytest.mark.parametrize("max_tokens", [2, 8, 40])
def test_what_may_end_at_any_place_goes_on_near_max_tokens(
    server: Any, asked: dict[str, Any], expected: str, max_tokens: int
) -> None:
    body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 2.0, "seed": 3, "n": 4}
    for choice in server.complete("x", structured_outputs=asked, **body)["choices"]:
        assert re.fullmatch(expected, choice["text"]), choice


def test_stop_strings_and_min_tokens_count_as_ever(server: Any) -> None:
    choice = server.complete("x", max_tokens=99, structured_outputs={"regex": "(ab|c){40}"}, stop="c")["choices"][0]
    assert set(choice["text"]) <= {"a", "b"} and choice["stop_reason"] == "c"
    asked = {"structured_outputs": {"regex": "[ab]{0,30}"}, "max_tokens": 60, "return_token_ids": True}
    choice = server.complete("x", min_tokens=12, **asked)["choices"][0]
    assert len(choice["token_ids"]) >= 12
    choice = server.complete("x", min_tokens=50, **asked)["choices"][0]
    assert len(choice["text"]) == 30 and choice["finish_reason"] == "stop", "the expression has no more"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "only one"),
    ({"response_format": NAMED, "guided_regex": "a"}, "guided_regex", "only one"),
    ({"response_format": NAMED, "ignore_eos": True}, "ignore_eos", "cannot be combined"),
    ({"response_format": NAMED, "bad_words": ["x"]}, "bad_words", "cannot be combined"),
    ({"response_format": NAMED, "allowed_token_ids": [5]}, "allowed_token_ids", "cannot be combined"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
    ({"response_format": {"type": "grammar"}}, "response_format.grammar", "missing"),
    ({"response_format": {"type": "regex"}}, "response_format.pattern", "missing"),
    ({"response_format": {"type": "regex", "value": {}}}, "response_format.value", "a regular expression"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"grammar": "what is this"}, "grammar", "neither a Lark"),
    ({"json_schema": {}, "grammar": 'root ::= "x"'}, "grammar", "only one"),
    ({"json_schema": "{"}, "json_schema", "no JSON schema"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"regexp": "x"}}, "structured_outputs.regexp", "unknown field"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "no JSON schema"),
    ({"structured_outputs": {"json": {"type": "strng"}}}, "structured_outputs.json.type", "strng"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-around"),
    ({"structured_outputs": {"grammar": "what is this"}}, "structured_outputs.grammar", "neither a Lark"),
    ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar", "unknown name"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"not": {"type": "null"}}, "strict": True},
            }
        },
        "response_format",
        "not",
    ),
]


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED)
def test_what_cannot_be_done_is_refused_with_a_sentence(
    server: Any, fields: dict[str, Any], param: str, says: str
) -> None:
    for stream in (False, True):
        status, reply = server.post("/v1/completions", {"prompt": "x", "max_tokens": 5, "stream": stream, **fields})
        assert status == 400, reply
        assert says in reply["error"]["message"] and reply["error"]["param"] == param, reply


def test_an_expression_that_explodes_ends_its_own_request_at_most(server: Any) -> None:
    """It may take more time per token than there is for a grammar; whether it does depends on the machine."""
    explosive = {"structured_outputs": {"regex": "(((a{1,999}){1,999}){1,999}){1,999}"}}
    status, reply = server.post("/v1/completions", {"prompt": "x", "max_tokens": 200, **explosive})
    if status == 200:
        assert set(reply["choices"][0]["text"]) == {"a"}
    else:
        assert status == 400 and "grammar" in reply["error"]["message"], reply
        assert reply["error"]["param"] == "structured_outputs.regex"
    assert server.complete("x", max_tokens=2)["choices"]


def test_what_a_schema_asks_for_beyond_the_grammar_is_left_out_unless_strict(server: Any) -> None:
    schema = {"type": "string", "enum": ["a", "b"], "contentEncoding": "base64", "not": {"const": "c"}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": False}}
    assert json.loads(server.chat(max_tokens=9, response_format=asked)["choices"][0]["message"]["content"]) in "ab"


def test_speculation_changes_no_token(server: Any) -> None:
    """Texts that repeat themselves, so that something is drafted and accepted."""
    asked = {
        "structured_outputs": {"regex": r"(\[(ab|cd){6}\] ){12}"},
        **{"max_tokens": 200, "return_metrics": True, "return_token_ids": True},
    }
    for temperature in (0, 1.0):
        fields = {"temperature": temperature, "seed": 2, **asked}
        plain = server.complete("x", speculation={"mode": "off"}, **fields)
        drafted = server.complete("x", speculation={"mode": "auto"}, **fields)
        assert drafted["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
        for _ in range(100 if temperature == 0 else 0):  # while the server tries whether drafting pays again
            if drafted["metrics"]["speculative_decoding"]["num_draft_tokens"]:
                break
            drafted = server.complete("x", speculation={"mode": "auto"}, **fields)
        else:
            assert temperature, "nothing is drafted"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 99)
    | st.text(max_size=5)
    | st.sampled_from(["object", "#", "^a$", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "type",
                        "properties",
                        "items",
                        "required",
                        "enum",
                        "const",
                        "anyOf",
                        "allOf",
                        "oneOf",
                        "$ref",
                        "$defs",
                    ),
                    *(
                        "pattern",
                        "minLength",
                        "maxItems",
                        "additionalProperties",
                        "prefixItems",
                        "format",
                        "x-guidance",
                        "a",
                    ),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=30, deadline=None)
@given(st.one_of(json_values, st.text(max_size=20)), st.sampled_from(["json", "regex", "choice", "grammar"]))
def test_whatever_is_asked_for_there_is_an_answer_or_a_reason(server: Any, value: Any, kind: str) -> None:
    body = {"prompt": "x", "max_tokens": 4, "structured_outputs": {kind: value}}
    status, reply = server.post("/v1/completions", body)
    assert status in (200, 400), reply
    if status == 400:
        assert reply["error"]["message"]


HUGE = '{"type": "integer", "%s": 10000019}'


@pytest.mark.parametrize(
    "asked", [{"json": HUGE % "multipleOf"}, {"grammar": f"start: %json {HUGE % r'u006dultipleOf'}"}]
)
def test_large_numbers_to_divide_by_are_tried_where_they_harm_nobody(server: Any, asked: dict[str, str]) -> None:
    """One of ten million takes the engine's process gigabytes."""
    asked = {name: text.replace("u006d", r"\u006d") for name, text in asked.items()}
    status, reply = server.post("/v1/completions", {"prompt": "x", "max_tokens": 5, "structured_outputs": asked})
    assert (status, reply["error"]["type"]) == (400, "invalid_request_error"), reply
    schema = {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 99}
    text = server.complete("x", max_tokens=9, temperature=1, structured_outputs={"json": schema})["choices"][0]["text"]
    assert int(text) % 7 == 0 and 10 <= int(text) <= 99


def test_large_grammars_are_tried_where_they_harm_nobody(server: Any) -> None:
    """Deep ones end the process that compiles them: the stack overflows."""
    deep = "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} | r{i + 1} "b"' for i in range(8000)) + '\nr8000: "a"'
    slow = "a?" * 6000
    for structure in ({"grammar": deep}, {"regex": slow}):
        status, reply = server.post("/v1/completions", {"prompt": "x", "structured_outputs": structure})
        assert status == 400 and ("too much" in reply["error"]["message"] or "takes" in reply["error"]["message"])
    names = [f"property_{number}" for number in range(300)]
    wide = {"type": "object", "properties": {name: {"enum": [1, 2]} for name in names}, "required": names[:2]}
    for number in range(2):  # with another body, too, of which only the grammar is known
        asked = {"structured_outputs": {"json": wide, "disable_any_whitespace": True}, "max_tokens": 30 + number}
        [choice] = server.complete("x", **asked)["choices"]
        assert choice["text"].startswith('{"property_0":')


def test_texts_of_grammars_are_bounded() -> None:
    for make in (regex_grammar, context_free_grammar):
        with pytest.raises(InvalidRequestError, match="at most"):
            make("a" * 300_000, "field")
    with pytest.raises(InvalidRequestError, match="at most"):
        choice_grammar(["a" * 300_000], "field")
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequestError):
        json_grammar(deep, "field")
