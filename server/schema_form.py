"""What JSON schemas have to look like: the first thing wrong in one is told with its place.

Only what whoever compiles schemas would refuse is refused here: a keyword says something of the types that it is about,
and an empty list of what something may be means that nothing is meant, which is no matter of form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from slipstream.server.errors import InvalidRequestError

TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
MOST_OF_A_NAME = 64
MOST_OF_A_PLACE = 400
"""Characters of one in an error."""
LIST_OF_SCHEMAS = ("anyOf", "oneOf", "allOf")
ONE_SCHEMA = ("items", "additionalProperties", "unevaluatedProperties")
SCHEMAS_BY_NAME = ("properties", "patternProperties")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_schema_or_list(value: Any) -> bool:
    return isinstance(value, dict | bool | list)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


Test = Callable[[Any], bool]
COUNT: tuple[Test, str] = (_is_count, "a whole number of 0 or more")
NUMBER: tuple[Test, str] = (_is_number, "a number")
BOUND: tuple[Test, str] = (lambda value: isinstance(value, bool) or _is_number(value), "a number")
TEXT: tuple[Test, str] = (lambda value: isinstance(value, str), "a text")
LIST: tuple[Test, str] = (lambda value: isinstance(value, list), "a list")
OBJECT: tuple[Test, str] = (lambda value: isinstance(value, dict), "an object")
SCHEMA: tuple[Test, str] = (_is_schema, "a schema")
ANYWHERE: dict[str, tuple[Test, str]] = {
    "enum": LIST, "anyOf": LIST, "oneOf": LIST, "allOf": LIST, "$ref": TEXT,
}  # fmt: skip
BY_TYPE: dict[str, dict[str, tuple[Test, str]]] = {
    "string": {"minLength": COUNT, "maxLength": COUNT, "pattern": TEXT, "format": TEXT},
    "number": {
        "minimum": NUMBER, "maximum": NUMBER, "exclusiveMinimum": BOUND, "exclusiveMaximum": BOUND, "multipleOf": NUMBER
    },
    "array": {
        "minItems": COUNT, "maxItems": COUNT, "prefixItems": LIST,
        "items": (_is_schema_or_list, "a schema or a list of them"),
    },
    "object": {
        "minProperties": COUNT, "maxProperties": COUNT, "required": (_are_names, "a list of names"),
        "properties": OBJECT, "patternProperties": OBJECT, "additionalProperties": SCHEMA,
        "unevaluatedProperties": SCHEMA,
    },
}  # fmt: skip
BY_TYPE["integer"] = BY_TYPE["number"]


def require_well_formed(schema: dict[str, Any], param: str, whose: str = "") -> None:
    """Raises InvalidRequestError for what is no schema, with its place in the field ``param``, and ``whose`` it is.

    Keywords that are null say nothing. What nothing refers to is not looked at.
    """
    try:
        _look_through(schema, param)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{error.message}{whose and f' ({whose})'}", param=error.param) from None


def _look_through(schema: dict[str, Any], param: str) -> None:
    waiting: list[tuple[Any, str]] = [(schema, param)]
    seen: set[int] = set()
    while waiting:
        found, at = waiting.pop()
        if not isinstance(found, dict):
            if not isinstance(found, bool):
                raise wrong(at, "a schema is needed, as an object", found)
            continue
        if id(found) in seen or (found is not schema and isinstance(found.get("$id"), str)):
            continue  # of one with an address of its own, references mean something else
        seen.add(id(found))
        inner: list[tuple[Any, str]] = []
        for keyword, (is_right, wanted) in keywords_of(found, at).items():
            value = found.get(keyword)
            if value is None:
                continue
            where = within(at, keyword)
            if not is_right(value):
                raise wrong(where, f"{wanted} is needed", value)
            if keyword in SCHEMAS_BY_NAME:
                inner += [(each, within(where, name)) for name, each in value.items()]
            elif keyword in LIST_OF_SCHEMAS or (keyword in ("items", "prefixItems") and isinstance(value, list)):
                inner += [(each, within(where, index)) for index, each in enumerate(value)]
            elif keyword in ONE_SCHEMA:
                inner.append((value, where))
            elif keyword == "$ref" and value.startswith("#/"):
                inner.append(referred(schema, value, param, where))
        waiting += reversed(inner)


def keywords_of(schema: dict[str, Any], at: str) -> dict[str, tuple[Test, str]]:
    """The keywords that say something of values with the types that a schema states, and how each of them looks."""
    stated = schema.get("type")
    types = [stated] if isinstance(stated, str) else list(TYPES) if stated is None else stated
    if not isinstance(types, list):
        raise wrong(within(at, "type"), f"one or several of {', '.join(TYPES)} are needed", stated)
    found = dict(ANYWHERE)
    for each in types:
        if not isinstance(each, str) or each not in TYPES:
            raise wrong(within(at, "type"), f"one of {', '.join(TYPES)} is needed", each)
        found |= BY_TYPE.get(each, {})
    return found


def referred(root: Any, reference: str, param: str, at: str) -> tuple[Any, str]:
    """What a reference within the schema refers to, and its place; ``at`` is that of the reference."""
    found, place = root, param
    for step in reference.removeprefix("#/").split("/"):
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        place = within(place, name)
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name in map(str, range(len(found))):
            found = found[int(name)]
        else:
            raise wrong(at, "a place in the schema is needed", reference)
    return found, place


def within(at: str, name: str | int) -> str:
    name = str(name)
    name = name if len(name) <= MOST_OF_A_NAME else f"{name[:MOST_OF_A_NAME]}…"
    return f"{at}.{name}" if len(at) <= MOST_OF_A_PLACE else at


def wrong(at: str, needed: str, found: Any) -> InvalidRequestError:
    shown = "an object" if isinstance(found, dict) else "a list" if isinstance(found, list) else repr(found)
    shown = shown if len(shown) <= MOST_OF_A_NAME else f"{shown[:MOST_OF_A_NAME]}…"
    return InvalidRequestError(f"{at}: {needed}, not {shown}", param=at)
