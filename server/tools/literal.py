"""Calls that look like those of a programming language, ``NAME(KEY=VALUE, …)``, with values that are no JSON (Llama,
OLMo 3, LFM2), and those of Gemma, ``call:NAME{KEY:VALUE, …}``, where texts stand between marks of their own.

JSON between the brackets is read, too: models write it, and grammars ask for it within lists and objects.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from typing import Any

from slipstream.server.tools.formats import ToolFormat
from slipstream.server.tools.parts import beginning_of
from slipstream.server.tools.scanner import Scanner
from slipstream.server.tools.tagged import AS_PYTHON, TEXT, escaped, kinds_of, resolved

MOST_WORD_CHARS = 512
MOST_DEPTH = 64
KEY = re.compile(r"[\w.-]*", re.ASCII)
WORD = re.compile(r"[^\s,()\[\]{}\"'=:<|]*")
NAME = re.compile(r"[\w.:-]*", re.ASCII)
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
QUOTES = ('"""', "'''", '"', "'")
CLOSES = {"[": "]", "(": ")", "{": "}"}
ESCAPES = {"x": 4, "u": 6, "U": 10}
"""How long escapes are that are not of two characters."""
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
AS_THEMSELVES = "\\'\"/"


class LiteralScanner(Scanner):
    """Reads one call while its text arrives: the arguments become JSON meanwhile, texts as they come."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        super().__init__(names)
        assert form.literal is not None
        self._head, self._open, self._close = form.call
        self._assign, quote = form.literal
        self._quotes = (quote, *QUOTES) if quote not in QUOTES else QUOTES
        self._rest = ""
        """What is not digested: bounded, but for what one piece brought."""
        self._step: Callable[[], bool] = self._read_name
        self._brackets: list[str] = []
        """That are open; the first one is that of all arguments."""
        self._has_members = [False]
        """For each of them."""
        self._quote = ""
        """That ends the text which is being read."""
        self._is_key = False
        """That text is a key."""

    @property
    def has_begun(self) -> bool:
        return self.name is not None and (self._has_members[0] or self.is_done)

    def push(self, text: str) -> str:
        self._rest += text
        while self._rest and not (self.is_done or self.is_wrong) and self._step():
            pass
        return self._rest if self.is_done or self.is_wrong else ""

    # Each of these digests some of the text; False when more has to come first.

    def _read_name(self) -> bool:
        rest = self._rest.lstrip()
        head = self._head
        if rest.startswith(head):
            rest = rest[len(head) :]
        elif head.startswith(rest):
            return False
        found = NAME.match(rest)
        assert found is not None
        name, after = found[0], rest[found.end() :]
        if not after:
            self.is_wrong = not any(each.startswith(name) for each in self._names)
        elif name in self._names and after.startswith(self._open):
            self.name, self._rest, self._step = name, after[len(self._open) :], self._read_key
            self._brackets = ["{"]
        else:
            self.is_wrong = True
        if self.is_wrong:
            self._rest = after
        return bool(after)

    def _read_key(self) -> bool:
        """A key, or the end of what has keys."""
        if not self._skip_space():
            return False
        is_first = len(self._brackets) == 1
        if self._rest.startswith(self._close if is_first else "}"):
            self._leave()
            return True
        if quote := self._quote_at_start():
            if len(quote) > len(self._rest):
                return False
            self._begin_member()
            self._begin_text(quote, is_key=True)
            return True
        found = KEY.match(self._rest)
        assert found is not None
        if found.end() == len(self._rest):
            return self._needs_more()
        if not found[0] or self._rest[found.end()] not in "=: \t\n":
            return self._is_broken()
        self._begin_member()
        self._new.append(json.dumps(found[0]))
        self._rest, self._step = self._rest[found.end() :], self._read_assign
        return True

    def _read_assign(self) -> bool:
        if not self._skip_space():
            return False
        sign = self._assign if len(self._brackets) == 1 else ":"
        if self._rest[0] != sign and self._rest[0] not in ":=":
            return self._is_broken()
        self._new.append(": ")
        self._rest, self._step = self._rest[1:], self._read_value
        return True

    def _read_value(self) -> bool:
        """A value, or the end of a list."""
        if not self._skip_space():
            return False
        in_list = self._brackets[-1] != "{"
        if in_list and self._rest[0] == CLOSES[self._brackets[-1]]:
            self._leave()
            return True
        if quote := self._quote_at_start():
            if len(quote) > len(self._rest):
                return False
            self._begin_item(in_list)
            self._begin_text(quote, is_key=False)
            return True
        if (bracket := self._rest[0]) in CLOSES:
            if len(self._brackets) >= MOST_DEPTH:
                return self._is_broken()
            self._begin_item(in_list)
            self._brackets.append(bracket)
            self._has_members.append(False)
            self._new.append("{" if bracket == "{" else "[")
            self._rest = self._rest[1:]
            self._step = self._read_key if bracket == "{" else self._read_value
            return True
        found = WORD.match(self._rest)
        assert found is not None
        if found.end() == len(self._rest):
            return self._needs_more()
        if not found[0]:
            return self._is_broken()
        self._begin_item(in_list)
        self._new.append(_value(found[0]))
        self._rest, self._step = self._rest[found.end() :], self._read_next
        return True

    def _read_next(self) -> bool:
        """What follows a value."""
        if not self._skip_space():
            return False
        bracket = self._brackets[-1]
        if self._rest[0] == ",":
            self._rest = self._rest[1:]
            self._step = self._read_key if bracket == "{" else self._read_value
        elif self._rest.startswith(self._close if len(self._brackets) == 1 else CLOSES[bracket]):
            self._leave()
        else:
            return self._is_broken()
        return True

    def _read_text(self) -> bool:
        has_escapes = self._quote in QUOTES
        end = self._rest.find(self._quote)
        slash = self._rest.find("\\") if has_escapes else -1
        if slash >= 0 and (end < 0 or slash < end):
            self._new.append(escaped(self._rest[:slash]))
            self._rest = self._rest[slash:]
            return self._read_escape()
        if end < 0:
            end = beginning_of(self._rest, (self._quote,))
            self._new.append(escaped(self._rest[:end]))
            self._rest = self._rest[end:]
            return False
        self._new.append(escaped(self._rest[:end]) + '"')
        self._rest = self._rest[end + len(self._quote) :]
        self._step = self._read_assign if self._is_key else self._read_next
        return True

    def _read_escape(self) -> bool:
        kind = self._rest[1:2]
        length = ESCAPES.get(kind, 2)
        if len(self._rest) < length:
            return False
        said, self._rest = self._rest[:length], self._rest[length:]
        digits = said[2:]
        if kind not in ESCAPES:
            plain = ESCAPED.get(kind, kind if kind in AS_THEMSELVES else said)
            self._new.append(escaped(plain))
        elif not re.fullmatch("[0-9a-fA-F]+", digits) or int(digits, 16) > 0x10FFFF:
            self._new.append(escaped(said[:2]))
            self._rest = digits + self._rest
        elif kind == "u":
            self._new.append(said)  # the same in JSON, where two may be one character
        elif 0xD800 <= (code := int(digits, 16)) < 0xE000:
            self._new.append(f"\\u{code:04x}")
        else:
            self._new.append(escaped(chr(code)))
        return True

    def _skip_space(self) -> bool:
        """Whether anything follows."""
        self._rest = self._rest.lstrip()
        return bool(self._rest)

    def _quote_at_start(self) -> str:
        """The quote that a text begins with, or which may yet become one; empty: no text begins."""
        rest = self._rest
        yet = (quote for quote in self._quotes if quote.startswith(rest) and quote != rest)
        return next(yet, "") or next((quote for quote in self._quotes if rest.startswith(quote)), "")

    def _begin_member(self) -> None:
        if len(self._brackets) == 1 and not self._has_members[0]:
            self._new.append("{")
        self._begin_item(True)

    def _begin_item(self, in_list: bool) -> None:
        """In an object, a member begins with its key."""
        if in_list:
            if self._has_members[-1]:
                self._new.append(", ")
            self._has_members[-1] = True

    def _begin_text(self, quote: str, is_key: bool) -> None:
        self._rest = self._rest[len(quote) :]
        self._new.append('"')
        self._quote, self._is_key, self._step = quote, is_key, self._read_text

    def _leave(self) -> None:
        """A bracket closes."""
        is_last = len(self._brackets) == 1
        self._rest = self._rest[len(self._close) if is_last else 1 :]
        bracket = self._brackets.pop()
        if is_last:
            self._new.append("}" if self._has_members[0] else "{}")
            self.is_done = True
        else:
            self._has_members.pop()
            self._new.append("}" if bracket == "{" else "]")
            self._step = self._read_next

    def _needs_more(self) -> bool:
        if len(self._rest) > MOST_WORD_CHARS:
            return self._is_broken()
        return False

    def _is_broken(self) -> bool:
        self.is_wrong = True
        return False


def _value(word: str) -> str:
    """What is neither a text nor a list or an object, as JSON; a word that means nothing is a text."""
    said = AS_PYTHON.get(word, word)
    if said in ("true", "false", "null") or NUMBER.fullmatch(said):
        return said
    try:
        number = float(said) if "." in said else int(said, 0)
    except ValueError:
        return json.dumps(word, ensure_ascii=False)
    return json.dumps(number) if math.isfinite(number) else json.dumps(word)


def _key(said: str) -> str:
    return said if said and KEY.fullmatch(said) else json.dumps(said, ensure_ascii=False)


def as_literal(form: ToolFormat, value: Any) -> str:
    """A value as it stands in a call."""
    assert form.literal is not None
    assign, quote = form.literal
    if isinstance(value, str):
        return quote + value + quote if quote not in QUOTES else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(as_literal(form, each) for each in value) + "]"
    if isinstance(value, dict):
        name = json.dumps if assign == "=" else _key
        return "{" + ", ".join(f"{name(key)}: {as_literal(form, each)}" for key, each in value.items()) + "}"
    if assign == "=" and (value is None or isinstance(value, bool)):
        return str(value)
    return json.dumps(value)


def literal_call(form: ToolFormat, name: str, values: dict[str, Any]) -> str:
    """A call as the models of a format write it."""
    assert form.literal is not None
    head, middle, tail = form.call
    between = ", " if form.literal[0] == "=" else ","
    said = [_key(key) + form.literal[0] + as_literal(form, value) for key, value in values.items()]
    return head + name + middle + between.join(said) + tail


def literal_rules(
    form: ToolFormat,
    number: int,
    name: str,
    arguments: dict[str, Any],
    schema_of: Callable[[str], str],
    symbols: Callable[[str], str],
) -> list[str]:
    """Rules of a grammar for ``call{number}``: arguments in the order of the schema.

    ``arguments`` is the schema of all of them, ``schema_of`` writes that of one.
    """
    assert form.literal is not None
    head, middle, tail = form.call
    assign, quote = form.literal
    between = symbols(", " if assign == "=" else ",")
    named, required = arguments.get("properties"), arguments.get("required")
    members = list(named.items()) if isinstance(named, dict) else []
    needed = [isinstance(required, list) and key in required for key, _ in members]
    lines, starts = [], []
    for index, (key, schema) in enumerate(members):
        rule, more = f"value{number}_{index}", f"more{number}_{index}"
        kinds = kinds_of(schema, arguments)
        values = (resolved(schema, arguments) or {}).get("enum") if kinds == TEXT else None
        mark = symbols(quote)
        if kinds == {"boolean"} and assign == "=":
            lines.append(f'{rule}: "True" | "False"')
        elif quote in QUOTES or kinds != TEXT:
            lines.append(f"{rule}: %json {schema_of(key)}")
        elif isinstance(values, list):
            said = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
            lines.append(f"{rule}: {mark} ({said}) {mark}")
        else:
            end = f"ANY {mark}" if mark.startswith("<") else f"end{number}_{index}"
            lines.append(f"{rule}: {mark} {end}")
            if not mark.startswith("<"):
                lines.append(f"end{number}_{index}[lazy]: ANY {mark}")
        part = f"{symbols(_key(key) + assign)} {rule}"
        rest = f"more{number}_{index + 1}"
        lines.append(f"{more}: {between} {part} {rest}" if needed[index] else f"{more}: ({between} {part})? {rest}")
        if not any(needed[:index]):
            starts.append(f"{part} {rest}")
    lines.append(f'more{number}_{len(members)}: ""')
    if not any(needed):
        starts.append('""')
    inner = " | ".join(starts)
    return [f"call{number}: {symbols(head + name + middle)} ({inner}) {symbols(tail)}", *lines]
