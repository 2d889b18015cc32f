"""What is wrong with a schema is told with its place, and only what could not be compiled is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slipstream.engine.errors import RequestError
from slipstream.engine.grammars.compiling import compile_grammar, vocabulary
from slipstream.server.errors import InvalidRequestError
from slipstream.server.schema_form import require_well_formed
from slipstream.server.structured import JSON_OPTIONS, json_grammar

BYTES = vocabulary([bytes([byte]) for byte in range(256)], [])
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"type": "strin"}, "type"),
    ({"type": 5}, "type"),
    ({"type": ["string", "any"]}, "type"),
    ({"type": ["string", {}]}, "type"),
    ({"type": "object", "properties": {"a": {"type": "dict"}}}, "properties.a.type"),
    ({"type": "object", "properties": []}, "properties"),
    ({"type": "object", "properties": {"a": "string"}}, "properties.a"),
    ({"type": "object", "required": True}, "required"),
    ({"type": "object", "required": ["a", 5]}, "required"),
    ({"enum": "a"}, "enum"),
    ({"type": "array", "items": "string"}, "items"),
    ({"type": "array", "items": [{"type": "foo"}]}, "items.0.type"),
    ({"type": "array", "prefixItems": {}}, "prefixItems"),
    ({"anyOf": {}}, "anyOf"),
    ({"anyOf": [{"type": "string"}, {"type": "none"}]}, "anyOf.1.type"),
    ({"allOf": [5]}, "allOf.0"),
    ({"$ref": "#/nope"}, "$ref"),
    ({"$ref": 5}, "$ref"),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "foo"}}}, "$defs.a/b.type"),
    ({"type": "string", "minLength": "3"}, "minLength"),
    ({"type": "string", "maxLength": -1}, "maxLength"),
    ({"type": "string", "pattern": 5}, "pattern"),
    ({"type": "integer", "minimum": "0"}, "minimum"),
    ({"type": "number", "maximum": True}, "maximum"),
    ({"additionalProperties": "no"}, "additionalProperties"),
    ({"type": "object", "additionalProperties": {"type": "foo"}}, "additionalProperties.type"),
]
FINE: list[dict[str, Any]] = [
    {},
    {"type": "string", "required": True, "items": "x", "minimum": "1"},
    {"type": ["string", "null"], "required": True},
    {"type": "object", "minLength": "x", "additionalProperties": False},
    {"type": "object", "properties": {"a": True}, "required": None},
    {"type": "array", "items": []},
    {"type": "object", "properties": {"a": {"enum": []}, "b": {"anyOf": []}, "c": {"type": []}}},
    {"type": "integer", "minimum": 2, "exclusiveMinimum": True},
    {"type": "object", "$defs": {"never meant": {"type": "foo"}}},
    {"enum": ["a", {"type": "foo"}], "default": {"type": "foo"}},
    {"type": "object", "properties": {"type": {"type": "string"}, "$ref": {"type": "string"}}},
    {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#/properties/c/anyOf/1"}, "c": {
        "anyOf": [{"type": "null"}, {"type": "integer"}]}}},
    {"$ref": "#/definitions/List%3Cint%3E", "definitions": {"List<int>": {"type": "array"}}},
]  # fmt: skip


@pytest.mark.parametrize(("schema", "place"), WRONG)
def test_what_is_wrong_is_told_with_its_place(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        json_grammar(schema, "p", best_effort=True)
    assert refused.value.param == f"p.{place}" and refused.value.message.startswith(f"p.{place}: ")
    options = JSON_OPTIONS | {"lenient": True}
    with pytest.raises(RequestError):
        compile_grammar(BYTES, f"start: %json {json.dumps({**schema, 'x-guidance': options})}")


@pytest.mark.parametrize("schema", FINE)
def test_what_can_be_compiled_is_left_alone(schema: dict[str, Any]) -> None:
    compile_grammar(BYTES, json_grammar(schema, "p", best_effort=True))


def test_large_and_deep_schemas_are_looked_through_once_and_told_of_shortly() -> None:
    deep: dict[str, Any] = {"type": "foo"}
    for _ in range(2000):
        deep = {"type": "array", "items": deep, "description": "x"}
    with pytest.raises(InvalidRequestError) as refused:
        require_well_formed(deep, "p")
    assert len(refused.value.message) < 2000
    names = [f"n{number}" for number in range(500)]
    around = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    require_well_formed({"$defs": dict.fromkeys(names, around), **around}, "p")
