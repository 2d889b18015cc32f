"""What an answer is to look like, in the ways in which clients say it, as the text of a grammar for the engine.

These say what is asked for and nothing about whether it can be done: the engine compiles the text, and tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from slipstream.server.errors import InvalidRequestError
from slipstream.server.schema_form import require_well_formed

MAX_GRAMMAR_CHARS = 2**18
WHITESPACE = r"[ \t\n\r]{1,32}"
"""Between the parts of JSON. Bounded: small models are known to write nothing else once they have begun."""
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "whitespace_pattern": WHITESPACE,
    "key_separator": ":",
    "item_separator": ",",
}
ANY_OBJECT: dict[str, Any] = {"type": "object"}
# Keywords of a schema that hold one, some in a list, and some by names.
ONE_SCHEMA = ("items", "additionalProperties", "contains")
SCHEMA_LISTS = ("items", "prefixItems", "anyOf", "oneOf")
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
COMBINING = frozenset(("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas"))
"""What stands beside ``properties`` and says more of the same object."""
SAYS_WHAT_ELSE = frozenset(("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties"))
"""What says which properties an object may have besides those that are named."""
VALUES = frozenset(("enum", "const", "default", "examples"))
"""Keywords of a schema that hold no schemas, whatever those look like."""
IN_REFERENCES = "#/%~:?&=+$,;@!'()*"
"""What stands in references as it is, besides letters, digits and ``_.-``."""
LOOKS_AROUND = re.compile(r"\(\?<?[=!]|(?<!\\)(?:\\\\)*\\[bBZ1-9]")
"""What no pattern can have that is to be followed."""
LITERAL_NAMES = re.compile(r"\^(?:\((?:\?:)?([\w |-]*)\)|([\w -]*))\$")
"""A pattern of names that says which they are."""
EBNF = re.compile(r"^[ \t]*([\w-]+)[ \t]*::=", re.MULTILINE)
LARK = re.compile(r"^[ \t]*(?:%llguidance\b|[?!]*start\b.*:)", re.MULTILINE)
"""How a line begins that tells the notation."""
QUOTED = r'"(?:\\.|[^"\\])*+"?|\[(?:\\.|[^\]\\])*+\]?'
"""Texts and classes of characters in EBNF; also without their end, so that it is looked for but once."""
ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)
CONTROLS = {"0": 0, "a": 7, "b": 8, "e": 27, "f": 12, "v": 11}
KNOWN_ESCAPES = frozenset('"\\[]nrtxuU')


def json_grammar(
    schema: dict[str, Any] | bool | str,
    param: str,
    *,
    best_effort: bool = False,
    whitespace: str | None = WHITESPACE,
) -> str:
    """JSON that matches a schema, which may be given as the text of one.

    ``best_effort``: what cannot be enforced is left out, where otherwise the engine would refuse it. ``whitespace`` is
    a regular expression for what may stand between the parts; None: nothing.
    """
    options = JSON_OPTIONS | {"whitespace_pattern": whitespace, "lenient": best_effort}
    try:
        found = json.loads(bounded(schema, param)) if isinstance(schema, str) else schema
        if found is True:
            found = {}
        if not isinstance(found, dict):
            raise ValueError("a schema is an object" if found is not False else "nothing matches it")
        require_well_formed(found, param)
        text = json.dumps({**closed(readable(found, best_effort)), "x-guidance": options}, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{param}: it is no JSON schema: {error}", param=param) from None
    return bounded(f"start: %json {text}", param)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose objects have only the properties that it names, unless it says what others they may have.

    What is not named nobody asked for, and a small model that has begun to make up properties may write nothing else.
    A schema that puts objects together of parts (``allOf``, or ``anyOf`` beside ``properties``) stays as it is.
    """
    found = dict(schema)
    inner = [found]

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            inner.append(dict(value))
            return inner[-1]
        return value

    for each in inner:  # which grows meanwhile
        for name, value in each.items():
            if isinstance(value, dict) and name in NAMED_SCHEMAS:
                each[name] = {key: copied(item) for key, item in value.items()}
            elif isinstance(value, list) and name in SCHEMA_LISTS:
                each[name] = [copied(item) for item in value]
            elif name in ONE_SCHEMA:
                each[name] = copied(value)
    if any("allOf" in each or ("properties" in each and each.keys() & COMBINING) for each in inner):
        return schema
    for each in inner:
        named, required = each.get("properties"), each.get("required", [])
        if "unevaluatedProperties" in each and not each.keys() & COMBINING:  # the same, where nothing is put together
            each.setdefault("additionalProperties", each.pop("unevaluatedProperties"))
        if not isinstance(named, dict) or each.keys() & SAYS_WHAT_ELSE:
            continue
        if isinstance(required, list) and all(isinstance(name, str) and name in named for name in required):
            each["additionalProperties"] = False
    return found


def readable(schema: Any, best_effort: bool) -> Any:
    """A schema such as the library reads it: references have only what those may have that are addresses, keywords that
    are null (as some languages write empty lists) are left out, and where ``best_effort`` is enough there are no
    patterns that it cannot follow."""
    if isinstance(schema, list):
        return [readable(each, best_effort) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in VALUES and (value is not None or name != "enum"):
            found[name] = value
        elif value is None:
            continue
        elif name == "$ref" and isinstance(value, str):
            found[name] = quote(value, safe=IN_REFERENCES)
        elif name in NAMED_SCHEMAS and isinstance(value, dict):
            follows = best_effort and name == "patternProperties"
            kept = {key: each for key, each in value.items() if not (follows and LOOKS_AROUND.search(key))}
            found[name] = {key: readable(each, best_effort) for key, each in kept.items()}
        elif name != "pattern" or not best_effort or not isinstance(value, str) or not LOOKS_AROUND.search(value):
            found[name] = readable(value, best_effort)
    named, patterns = found.get("properties"), found.get("patternProperties")
    return with_named_only_once(found, named, patterns) if isinstance(named, dict) and patterns else found


def with_named_only_once(schema: dict[str, Any], named: dict[str, Any], patterns: dict[str, Any]) -> dict[str, Any]:
    """A schema without patterns of nothing but names that its properties have: these follow them, too.

    The library would have an object go on after all that it may have."""
    named, patterns = dict(named), dict(patterns)
    for pattern, rule in list(patterns.items()):
        found = LITERAL_NAMES.fullmatch(pattern)
        names = (found[1] or found[2] or "").split("|") if found else []
        if not names or not all(name in named for name in names):
            continue
        del patterns[pattern]
        for name in names:
            known = named[name]
            says_it = isinstance(known, dict) and isinstance(rule, dict) and rule.items() <= known.items()
            named[name] = known if says_it or rule is True else {"allOf": [known, rule]}
    kept = {key: value for key, value in schema.items() if key != "patternProperties"}
    more = {"patternProperties": patterns} if patterns else {"additionalProperties": True}
    return {**more, **kept, "properties": named}


def regex_grammar(pattern: str, param: str) -> str:
    """Text that matches a regular expression from its beginning to its end, with anchors or without."""
    pattern = pattern.removeprefix("^")
    if re.search(r"(?<!\\)(?:\\\\)*\$\Z", pattern):
        pattern = pattern[:-1]
    return bounded(f"start: /{regex_to_lark(pattern, 'd')}/", param)


def choice_grammar(texts: Sequence[str], param: str) -> str:
    """One of these texts, which are one terminal: as alternatives of a rule they may be 2000 at most."""
    choices = " | ".join(json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in texts)
    return bounded(f"start: CHOICE\nCHOICE: {choices}", param)


def context_free_grammar(text: str, param: str) -> str:
    """A grammar in Lark's notation, or in the EBNF (GBNF) of llama.cpp and xgrammar."""
    bounded(text, param)
    try:
        if text.startswith("{"):  # which would pass for several grammars, see ``several``
            raise ValueError("it begins with a brace")
        is_lark = LARK.search(text) and not EBNF.search(text)
        return bounded(text if is_lark else gbnf_to_lark(plain_ebnf(text)), param)
    except (InvalidRequestError, MemoryError):
        raise
    except Exception as error:  # the library raises plain Exception, and whatever else it meets
        raise InvalidRequestError(
            f"{param}: neither a Lark grammar (with a rule called start) nor EBNF (with one called root): {error}",
            param=param,
        ) from None


def plain_ebnf(text: str) -> str:
    """EBNF such as the library reads it.

    That takes no rule called start, nor names that differ in capitals and dashes alone, no alternatives on a line of
    their own, and gets escapes wrong that begin with zeros.
    """
    text = re.sub(rf"({QUOTED})|#[^\r\n]*", lambda found: ESCAPE.sub(_unescaped, found[1] or ""), text)
    text = re.sub(
        rf"({QUOTED})|\s+",
        lambda found: " " if found[1] is None and text.startswith("|", found.end()) else found[0],
        text,
    )
    names = {
        name: f"r{number}_" + re.sub(r"\W", "_", name, flags=re.ASCII).lower()
        for number, name in enumerate(EBNF.findall(text))
        if name != "root"
    }
    return re.sub(rf"({QUOTED})|[\w-]+", lambda found: found[0] if found[1] else names.get(found[0], found[0]), text)


def _unescaped(found: re.Match[str]) -> str:
    """A character as itself, or, where it may mean something, as the escape that all understand."""
    said = found[1]
    if said in KNOWN_ESCAPES:
        return found[0]
    code = int(said[1:], 16) if len(said) > 1 else CONTROLS.get(said, ord(said))
    if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
        return found[0]
    return f"\\x{code:02x}" if code < 0x80 else chr(code)


def after_reasoning(grammar: str, begin: str, end: str, is_open: bool) -> str:
    """A grammar for an answer with reasoning before it, between two symbols; ``is_open`` if it has begun already."""
    space = "SPACE: /[ \\t\\n]{0,8}/\nTEXT: /(.|\\n)*/"
    thought = f"TEXT {end}" if end.startswith("<") else "thought"
    lines = [f"start: {thought} SPACE @answer" if is_open else f"start: ({begin} {thought} SPACE)? @answer", space]
    if thought == "thought":
        lines.append(f"thought[lazy]: TEXT {end}")
    return several("\n".join(lines), grammar)


def several(first: str, answer: str) -> str:
    """A grammar in Lark's notation with another one, which it calls ``@answer``."""
    if answer.startswith("{"):  # it has one already
        first, answer = first.replace("@answer", "@whole"), answer
        whole, *others = json.loads(answer)["grammars"]
        inner = [{"name": "whole", **whole}, *others]
    else:
        inner = [{"name": "answer", "lark_grammar": answer}]
    return json.dumps({"grammars": [{"lark_grammar": first}, *inner]}, ensure_ascii=False)


def bounded(text: str, param: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(
            f"{param}: at most {MAX_GRAMMAR_CHARS} characters, not {len(text)}", param=param, code="too_complex"
        )
    return text
