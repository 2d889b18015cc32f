"""What an answer is to look like, in the ways in which clients say it, as the text of a grammar for the engine.

These say what is asked for and nothing about whether it can be done: the engine compiles the text, and tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from slipstream.server.errors import InvalidRequestError

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
        text = json.dumps({**found, "x-guidance": options}, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{param}: it is no JSON schema: {error}", param=param) from None
    return bounded(f"start: %json {text}", param)


def regex_grammar(pattern: str, param: str) -> str:
    """Text that matches a regular expression from its beginning to its end, with anchors or without."""
    pattern = pattern.removeprefix("^")
    if re.search(r"(?<!\\)(?:\\\\)*\$\Z", pattern):
        pattern = pattern[:-1]
    return bounded(f"start: /{regex_to_lark(pattern, 'd')}/", param)


def choice_grammar(texts: Sequence[str], param: str) -> str:
    """One of these texts."""
    choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return bounded(f"start: {choices}", param)


def context_free_grammar(text: str, param: str) -> str:
    """A grammar in Lark's notation, or in the EBNF (GBNF) of llama.cpp and xgrammar."""
    bounded(text, param)
    try:
        return bounded(any_to_lark(text), param)
    except (InvalidRequestError, MemoryError):
        raise
    except Exception as error:  # the library raises plain Exception, and whatever else it meets
        raise InvalidRequestError(
            f"{param}: neither a Lark grammar (with a rule called start) nor EBNF (with one called root): {error}",
            param=param,
        ) from None


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
