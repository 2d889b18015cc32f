"""Reads one call of a tool from JSON text that is still arriving."""

from __future__ import annotations

import json
from collections.abc import Collection

ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """``{"name": …, "arguments": {…}}`` with the members in any order, and further ones, which are left out."""

    def __init__(self, names: Collection[str]) -> None:
        """``names`` of the tools: what calls none of them is wrong."""
        self.text = ""
        """All that was taken, as it came."""
        self.name: str | None = None
        self.arguments = ""
        """As much of them as there is."""
        self.is_done = False
        self.is_wrong = False
        """It is no call, or the text of one is broken."""
        self._names = names
        self._ends_with_arguments = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._string_at = 0
        self._key: str | None = None
        self._value_at = -1
        """Where the value of the member begins; -1 before its colon."""
        self._has_arguments = False
        """The member is the arguments, and their last bracket was there."""

    def begin(self, name: str) -> None:
        """The name is known, and nothing but the arguments come."""
        self.push(f'{{"name": {json.dumps(name)}, "arguments": ')
        self._ends_with_arguments = True

    @property
    def has_begun(self) -> bool:
        """Whether it is known which tool is called, and that its arguments come."""
        return self.name is not None and self.arguments.startswith("{")

    @property
    def is_whole(self) -> bool:
        """Whether all of the call is there, but for the bracket after its arguments, which some models forget."""
        return self.name is not None and self._has_arguments

    def push(self, text: str) -> int:
        """Takes characters up to the end of the object, or to where it turns out to be wrong; how many."""
        before, at = len(self.text), len(self.text)
        self.text += text
        while at < len(self.text):
            if self.is_whole and self.text[at] not in " \t\r\n,}":
                self.is_done = True
                break
            self._take(self.text[at], at)
            at += 1
            if self.is_done or self.is_wrong:
                break
        self.text = self.text[:at]
        if self._key in ARGUMENTS and self._value_at >= 0:
            value = self.text[self._value_at :].lstrip()
            self.arguments = value.rstrip() if self._depth == 1 else value
        return at - before

    def _take(self, character: str, at: int) -> None:
        if self._in_string:
            if self._escaped or character == "\\":
                self._escaped = not self._escaped
            elif character == '"':
                self._in_string = False
                if self._depth == 1 and self._value_at < 0:
                    self._key = _text(self.text[self._string_at : at + 1])
        elif character == '"':
            self._in_string, self._string_at = True, at
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._has_arguments = self._depth == 1 and self._key in ARGUMENTS
            if self._depth == 1 and self._ends_with_arguments:
                self.is_done = True
            elif self._depth == 0:
                self._end_member(at)
                self.arguments = self.arguments or "{}"
                self.is_done = self.name is not None and not self.is_wrong
        elif self._depth == 1 and character == ":" and self._value_at < 0:
            self._value_at = at + 1
        elif self._depth == 1 and character == ",":
            self._end_member(at)
        if self._depth == 0 and not self.is_done:
            self.is_wrong = True

    def _end_member(self, at: int) -> None:
        value = self.text[self._value_at : at].strip() if self._value_at >= 0 else ""
        if self._key == "name":
            if (name := _text(value)) in self._names:
                self.name = name
            else:
                self.is_wrong = True
        elif self._key in ARGUMENTS:
            # Some models write JSON in a text, others null or an empty text where there are none.
            said = value if (text := _text(value)) is None else text
            self.arguments = "{}" if said in ("", "null") else said
        self._key, self._value_at, self._has_arguments = None, -1, False


def _text(value: str) -> str | None:
    """A text written as JSON."""
    try:
        found = json.loads(value, strict=False)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, str) else None
