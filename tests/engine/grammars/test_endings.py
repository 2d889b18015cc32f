"""Ends of texts are found also where a greedy search would go round in circles."""

from __future__ import annotations

import json
import re

import pytest

from slipstream.engine.grammars.compiling import compile_grammar, vocabulary
from slipstream.engine.grammars.endings import Alphabet, Endings
from slipstream.server.structured import json_grammar, regex_grammar

BYTES = [bytes([byte]) for byte in range(256)]
TOKENS = vocabulary(BYTES, [])


def ended(grammar: str, said: str) -> str | None:
    matcher = compile_grammar(TOKENS, grammar)
    assert matcher.consume_tokens(list(said.encode()))
    found = Endings(matcher, Alphabet(BYTES, [])).after(None, None, 200)
    return None if found is None else said + b"".join(BYTES[step] for step in found.steps).decode()


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("date-time", ""),
        ("date-time", "2026-01-01T10:10:10.10"),
        ("time", "10:10:10."),
        ("date", "2026-"),
        ("duration", ""),
        ("duration", "P1"),
        ("email", ""),
        ("email", "ann"),
        ("email", "ann@"),
        ("hostname", "a."),
        ("ipv4", "1."),
        ("ipv6", ""),
        ("uuid", "ab"),
        ("uri", "http:"),
    ],
)
def test_texts_of_every_format_come_to_an_end(form: str, said: str) -> None:
    properties = {"a": {"type": "string", "format": form}, "b": {"type": "array", "items": {"type": "number"}}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
    found = ended(json_grammar(schema, "p"), f'{{"a":"{said}')
    assert found is not None and len(found) < 80
    assert json.loads(found)["b"] == []


@pytest.mark.parametrize("pattern", [r"\d+\.\d+[A-F]+x", r"([a-z0-9]+-)+[A-Z]{3}", "(a|b)*c", r"[\w.]+@", r"\d{20}x"])
def test_what_repeats_without_end_is_left_after_a_while(pattern: str) -> None:
    found = ended(regex_grammar(pattern, "p"), "")
    assert found is not None and re.fullmatch(pattern, found)
