"""Grammars that calls of tools follow: of all that may be said, or lazily, from where a call begins.

Schemas stand in them as they are, each with references of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from slipstream.engine.grammars.compiling import OWNER
from slipstream.server.structured import IN_REFERENCES, JSON_OPTIONS, bounded, closed, readable, several
from slipstream.server.tools.formats import ToolFormat
from slipstream.server.tools.literal import literal_rules
from slipstream.server.tools.tagged import tagged_rules

MOST_CALLS = 32
"""In one answer; without an end, small models go on and on."""
ROOT = "#/$defs/arguments"
ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: dict[str, Any]
    """A JSON schema."""
    strict: bool = False


def calls_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    symbols: Callable[[str], str],
    *,
    answer: str | None,
    parallel: bool,
    param: str,
) -> str:
    """Arguments follow the schema of the tool; of one that is not strict, as far as it can be enforced.

    ``answer`` is the grammar of an answer without calls; empty for any text, in which what begins like a call has to be
    one; None: there have to be calls. ``symbols`` writes a text, with special tokens in it, as symbols of a grammar.
    """
    more = f"{{0,{MOST_CALLS - 1}}}"
    before, after, separator = symbols(form.before), symbols(form.after), symbols(form.separator)
    begin = symbols(form.begin)
    if not parallel:
        rest = f"{before} body {after}"
    elif form.begins_each:
        rest = f"{before} body {after} ({separator} {begin} {before} body {after}){more}"
    else:
        rest = f"{before} body ({separator} body){more} {after}"
    lines = [*_bodies(form, tools, symbols), f"rest: {rest}"]
    starts = [f"({begin})? rest" if form.is_bare and begin else f"{begin} rest"]
    if answer is None:
        pass
    elif answer:
        starts.append("@answer")
    elif form.is_bare:
        starts = ["OTHER", "rest"]
        if form.is_object or form.before:
            lines.append(r"OTHER: /([^{\[ \t\r\n](.|\n)*)?/")
        else:
            names = "|".join(re.escape(tool.name) for tool in tools)
            lines.append(rf"OTHER: {ANY_TEXT} & ~/[ \t\r\n]*({names})[ \t\r]*\n(.|\n)*/")
    else:
        starts = ["OTHER"]
        lines.append(f"OTHER: {ANY_TEXT}")
    if answer == "" and begin.startswith("<"):
        starts[0] = f"OTHER ({begin} rest)?"
    elif answer == "" and begin:
        starts.append("begun rest")
        lines.append(f"begun[lazy]: OTHER {begin}")
    lines.append("start: " + " | ".join(starts))
    text = bounded("\n".join(lines), param)
    return several(text, answer) if answer else text


def _bodies(form: ToolFormat, tools: Sequence[Tool], symbols: Callable[[str], str]) -> list[str]:
    """A rule ``body`` for a call of any of the tools."""
    lines = [] if form.is_object or form.header else [f"ANY: {ANY_TEXT}"]
    lines += ["body: " + " | ".join(f"call{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        if form.is_bare and form.is_object:
            # As JSON as a whole: beside other JSON, a parser could not tell which of them begins with a bracket.
            lines.append(f"call{number}: %json {_json(_owned(tool, _whole(form, tool)))}")
            continue
        if not form.is_object and not form.header:
            rules = tagged_rules if form.parameter is not None else literal_rules
            lines += rules(form, number, tool.name, arguments_of(tool), partial(_one, tool), symbols)
            continue
        head, middle, tail = form.call
        name = tool.name if form.header else json.dumps(tool.name)[1:-1]
        lines += [
            f"call{number}: {symbols(head + name + middle)} arguments{number} {symbols(tail)}",
            f"arguments{number}: %json {_json(_owned(tool, arguments_of(tool)))}",
        ]
    return lines


def _one(tool: Tool, name: str) -> str:
    """The schema of one argument, with that of all in it, as JSON."""
    pointer = quote(name.replace("~", "~0").replace("/", "~1"), safe=IN_REFERENCES)
    whole = {"arguments": _moved(arguments_of(tool))}
    return _json(_owned(tool, {"$ref": f"{ROOT}/properties/{pointer}", "$defs": whole}))


def _owned(tool: Tool, schema: dict[str, Any]) -> dict[str, Any]:
    """A schema for the library, which says whose it is when it cannot be used."""
    options = JSON_OPTIONS | {"lenient": not tool.strict}
    owner = {OWNER: f"of the tool {tool.name}"}
    return owner | schema | owner | {"x-guidance": options}


def _whole(form: ToolFormat, tool: Tool) -> dict[str, Any]:
    """The schema of a call, with that of its arguments in it."""
    arguments = "parameters" if "parameters" in form.call[1] else "arguments"
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, arguments: {"$ref": ROOT}},
        "required": ["name", arguments],
        "additionalProperties": False,
        "$defs": {"arguments": _moved(arguments_of(tool))},
    }


def arguments_of(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments."""
    found: dict[str, Any] = closed(readable(tool.parameters, best_effort=not tool.strict))
    return found


def _moved(schema: Any) -> Any:
    """A schema whose references are to itself at another place."""
    if isinstance(schema, list):
        return [_moved(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "$ref" and isinstance(value, str) and (value + "/").startswith("#/"):
            found[name] = ROOT + value[1:]
        elif name != "$id" or not isinstance(value, str):  # from which references would be counted
            found[name] = _moved(value)
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
