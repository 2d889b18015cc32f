"""Calls whose arguments stand between tags, each by itself, and not as a whole in JSON (Qwen3-Coder, GLM-4.5, …).

A text stands there as it is, everything else as JSON; which of them it is the schema of the tool tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import unquote

from slipstream.server.tools.formats import IN_TAGS, ToolFormat
from slipstream.server.tools.parts import beginning_of
from slipstream.server.tools.scanner import Scanner

Kinds = frozenset[str]
"""The types of JSON that a value may have; empty: any."""
TEXT: Kinds = frozenset(("string",))
ANY: Kinds = frozenset()
STATED = re.compile(r'string="(true|false)"')
MOST_REFERENCES = 8
NAME = re.compile(r"[\w.:-]*", re.ASCII)
AS_PYTHON = {"True": "true", "False": "false", "None": "null"}
"""What templates write, and models with them, for what JSON calls otherwise."""


def kinds_of_arguments(parameters: Mapping[str, Any]) -> dict[str, Kinds]:
    """By the names of the arguments that the schema of a tool has."""
    named = parameters.get("properties")
    return {name: kinds_of(each, parameters) for name, each in named.items()} if isinstance(named, dict) else {}


def kinds_of(schema: Any, root: Any, depth: int = MOST_REFERENCES) -> Kinds:
    """``root`` is where references begin."""
    schema = resolved(schema, root)
    if not isinstance(schema, dict):
        return ANY
    for name in ("anyOf", "oneOf"):
        if isinstance(cases := schema.get(name), list):
            found = [kinds_of(case, root, depth - 1) for case in cases] if depth else [ANY]
            return frozenset().union(*found) if all(found) else ANY
    if "const" in schema:
        return frozenset((_kind(schema["const"]),))
    if isinstance(values := schema.get("enum"), list):
        return frozenset(map(_kind, values))
    stated = schema.get("type")
    stated = [stated] if isinstance(stated, str) else stated
    return frozenset(stated) if isinstance(stated, list) and all(isinstance(each, str) for each in stated) else ANY


def resolved(schema: Any, root: Any) -> Any:
    """What a schema that is a reference refers to; None if that is nothing."""
    for _ in range(MOST_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            return schema
        schema = root
        for step in reference.removeprefix("#/").split("/"):
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, dict) else None
    return None


def _kind(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def read_value(said: str, kinds: Kinds) -> Any:
    """What the text between the tags of an argument means."""
    if kinds == TEXT:
        return said
    stripped = said.strip()
    try:
        value = json.loads(AS_PYTHON.get(stripped, stripped), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return said
    kind = _kind(value)
    fits = not kinds or kind in kinds or (kind == "integer" and "number" in kinds)
    return said if "string" in kinds and not fits else value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def tagged_call(form: ToolFormat, name: str, values: dict[str, Any]) -> str:
    """A call as the models of a format write it."""
    assert form.parameter is not None
    head, middle, tail = form.call
    before, between, after = form.parameter
    parts = [
        before
        + key
        + between.replace(IN_TAGS, "true" if isinstance(value, str) else "false")
        + (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        + after
        for key, value in values.items()
    ]
    return head + name + middle + "".join(parts) + tail


def tagged_rules(
    form: ToolFormat,
    number: int,
    name: str,
    arguments: dict[str, Any],
    schema_of: Callable[[str], str],
    symbols: Callable[[str], str],
) -> list[str]:
    """Rules of a grammar for ``call{number}``: arguments in the order of the schema, texts without bounds.

    ``arguments`` is the schema of all of them, ``schema_of`` writes that of one.
    """
    assert form.parameter is not None
    before, between, after = form.parameter
    head, middle, tail = form.call
    named, required, close = arguments.get("properties"), arguments.get("required"), symbols(after)
    parts, lines = [symbols(head + name + middle)], []
    for index, (key, schema) in enumerate(named.items() if isinstance(named, dict) else ()):
        rule, kinds = f"value{number}_{index}", kinds_of(schema, arguments)
        values = (resolved(schema, arguments) or {}).get("enum") if kinds == TEXT else None
        if isinstance(values, list):
            said = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
            lines.append(f"{rule}: ({said}) {close}")
        elif kinds and "string" not in kinds:
            lines.append(f"{rule}: inner{number}_{index} {close}")
            lines.append(f"inner{number}_{index}: %json {schema_of(key)}")
        elif close.startswith("<"):  # a token, which no text contains
            lines.append(f"{rule}: ANY {close}")
        else:
            lines.append(f"{rule}[lazy]: ANY {close}")
        texts, others = (symbols(before + key + between.replace(IN_TAGS, said)) for said in ("true", "false"))
        if not kinds or "string" in kinds:
            part = f"{texts} {rule}"
            if IN_TAGS in between and kinds != TEXT:
                part = f"({part} | {others} inner{number}_{index} {close})"
                lines.append(f"inner{number}_{index}: %json {schema_of(key)}")
        else:
            part = f"{others} {rule}"
        parts.append(part if isinstance(required, list) and key in required else f"({part})?")
    return [f"call{number}: {' '.join([*parts, symbols(tail)])}", *lines]


class TaggedScanner(Scanner):
    """Reads one call while its text arrives, as CallScanner does those in JSON: the arguments become JSON meanwhile."""

    def __init__(self, form: ToolFormat, names: Collection[str], kinds: Mapping[str, Mapping[str, Kinds]]) -> None:
        """``kinds`` of the tools' arguments."""
        super().__init__(names)
        assert form.parameter is not None
        head, middle, tail = (part.strip() for part in form.call)
        before, between, after = form.parameter
        self._kinds = kinds
        self._middle = middle
        self._before, self._after = before.strip(), after.strip()
        # Some models forget the end of the call before that of what stands around it.
        self._next = tuple(tag for tag in (self._before, tail, form.after.strip()) if tag)
        self._key_end, *others = between.split() if IN_TAGS not in between else between.partition(" ")[:1]
        """What ends a key; where that is a quotation mark, there is more up to the end of the tag."""
        self._before_value = others[0] if others else ""
        if self._key_end.startswith('"'):
            self._key_end, self._before_value = '"', ">"
        self._breaks = between.endswith("\n"), after.startswith("\n")
        """Whether a line ends before a value, and after it, which is none of it."""
        self._rest = ""
        """What is not digested: bounded, but for what one piece brought."""
        self._expected: tuple[str, ...] = (head,)
        self._step = self._expect
        self._key: str | None = None
        """Name of an argument whose value has not begun."""
        self._said: list[str] = []
        """What there is of the key or of a value that is no text."""
        self._kind = ANY
        self._is_first = True
        """Nothing of the value was digested."""
        self._skips_line = False
        """The line that ends before the value has not been looked for."""
        self._num_arguments = -1
        """-1: they have not begun."""

    @property
    def has_begun(self) -> bool:
        return self._num_arguments >= 0

    def push(self, text: str) -> str:
        self._rest += text
        while not (self.is_done or self.is_wrong) and self._step():
            pass
        return self._rest if self.is_done or self.is_wrong else ""

    # Each of these digests some of the text; False when more has to come first.

    def _expect(self) -> bool:
        """One of some tags, perhaps with white space before it."""
        rest = self._rest = self._rest.lstrip()
        for tag in self._expected:
            if rest.startswith(tag):
                self._rest = rest[len(tag) :]
                self._after_tag(tag)
                return True
        if any(tag.startswith(rest) for tag in self._expected):
            return False
        # Up to where it is no tag any more: what could have become one was taken before.
        known = max(_common(rest, tag) for tag in self._expected)
        self._rest = rest[known:]
        if self.has_begun:  # the tag that ends the call was forgotten
            self._end()
        else:
            self.is_wrong = True
        return True

    def _after_tag(self, tag: str) -> None:
        if self.name is None:
            self._step = self._read_name
        elif not self.has_begun:
            self._new.append("{")
            self._num_arguments, self._expected = 0, self._next
        elif self._key is not None:
            self._begin_value()
        elif tag == self._before:
            self._step = self._read_key
        else:
            self._end()

    def _read_name(self) -> bool:
        found = NAME.match(self._rest)
        assert found is not None
        name = found[0]
        if found.end() == len(self._rest) and any(each.startswith(name) for each in self._names):
            return False
        self._rest = self._rest[found.end() :]
        if name in self._names:
            self.name, self._expected, self._step = name, (self._middle,), self._expect
        else:
            self.is_wrong = True
        return True

    def _read_key(self) -> bool:
        if not self._read_until(self._key_end):
            return False
        self._key = "".join(self._said).strip()
        self._said = []
        assert self.name is not None
        self._kind = self._kinds.get(self.name, {}).get(self._key, ANY)
        if self._before_value == ">":
            self._step = self._read_attributes
        elif self._before_value:
            self._expected, self._step = (self._before_value,), self._expect
        else:
            self._begin_value()
        return True

    def _read_attributes(self) -> bool:
        """The rest of a tag, which may say whether the value is a text."""
        if not self._read_until(">"):
            return False
        said, self._said = "".join(self._said), []
        if found := STATED.search(said):
            self._kind = TEXT if found[1] == "true" else self._kind - TEXT
        self._begin_value()
        return True

    def _begin_value(self) -> None:
        before = ", " if self._num_arguments else ""
        self._new.append(before + json.dumps(self._key, ensure_ascii=False) + ": ")
        self._num_arguments += 1
        self._key, self._is_first, self._step = None, True, self._read_value
        self._skips_line = self._breaks[0]

    def _read_until(self, tag: str) -> bool:
        """Whether the tag was there; what stands before it is what was said."""
        said, end, after = self._rest.partition(tag)
        if not end:
            safe = beginning_of(said, (tag,))
            said, after = said[:safe], said[safe:]
        self._said.append(said)
        self._rest = after
        return bool(end)

    def _read_value(self) -> bool:
        if self._skips_line and self._rest:
            self._rest, self._skips_line = self._rest.removeprefix("\n"), False
        if not self._rest:
            return False
        if self._kind != TEXT:
            self._is_first = False
            if not self._read_until(self._after):
                return False
            said, self._said = "".join(self._said), []
            said = said.removesuffix("\n") if self._breaks[1] else said
            self._new.append(json.dumps(read_value(said, self._kind), ensure_ascii=False))
            self._expected, self._step = self._next, self._expect
            return True
        if self._is_first:
            self._new.append('"')
        self._is_first = False
        said, end, after = self._rest.partition(self._after)
        if end:
            self._rest = after
            said = said.removesuffix("\n") if self._breaks[1] else said
            self._new.append(escaped(said) + '"')
            self._expected, self._step = self._next, self._expect
            return True
        markers = (self._after, "\n" + self._after) if self._breaks[1] else (self._after,)
        safe = beginning_of(self._rest, markers)
        self._new.append(escaped(self._rest[:safe]))
        self._rest = self._rest[safe:]
        return False

    def _end(self) -> None:
        self._new.append("}")
        self.is_done = True


def escaped(text: str) -> str:
    """A text as it stands in JSON between quotation marks."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _common(text: str, tag: str) -> int:
    """How many characters both begin with."""
    return next((at for at, (one, other) in enumerate(zip(text, tag, strict=False)) if one != other), len(tag))
