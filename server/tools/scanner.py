"""Reads one call of a tool from JSON text that is still arriving."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection

from slipstream.server.tools.formats import ToolFormat

NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters")
IN_TEXT = re.compile(r'["\\]')
CONTROL = re.compile(r"[\x00-\x1f]")
BETWEEN_TEXTS = re.compile(r'["{}\[\]:,]')
MOST_HEADER_CHARS = 512
"""Before the arguments of a call whose name stands before them; names have 128 characters at most."""


class Scanner(ABC):
    """Reads one call. What it does with a piece of text takes a time that depends on the piece, not on what came
    before, so what it keeps is in lists of pieces."""

    def __init__(self, names: Collection[str]) -> None:
        """``names`` of the tools: what calls none of them is wrong."""
        self.name: str | None = None
        self.is_done = False
        self.is_wrong = False
        """It is no call, or the text of one is broken."""
        self._names = names
        self._new: list[str] = []
        """The part of the arguments that nobody has taken yet."""

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """Whether it is known which tool is called, and that its arguments come."""

    @property
    def is_whole(self) -> bool:
        """Whether all of the call is there, but perhaps for what ends it, which some models forget."""
        return self.is_done

    @abstractmethod
    def push(self, text: str) -> str:
        """Takes text up to the end of the call, or to where it turns out to be wrong; what it leaves.

        That may begin with the end of pieces before, which could have become more of the call.
        """

    def take(self) -> str:
        """What of the arguments, as JSON text, has come since it was asked last."""
        new, self._new = "".join(self._new), []
        return new


class JsonSigns:
    """Goes from sign to sign through JSON text that comes in pieces."""

    def __init__(self) -> None:
        self.depth = 0
        """How many brackets are open; their kinds do not matter."""
        self.in_text = False
        self._escaped = False

    def next(self, text: str, at: int) -> tuple[int, str]:
        """Where the next sign ends, and which it is; empty if there is none. Those within texts are none."""
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (IN_TEXT if self.in_text else BETWEEN_TEXTS).search(text, at)
            if found is None:
                break
            sign, at = found[0], found.end()
            if sign == "\\":
                self._escaped = True
                continue
            if sign == '"':
                self.in_text = not self.in_text
            elif sign in "{[":
                self.depth += 1
            elif sign in "}]":
                self.depth -= 1
            return at, sign
        return len(text), ""


class CallScanner(Scanner):
    """``{"name": …, "arguments": {…}}`` with the members in any order, and further ones, which are left out."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._signs = JsonSigns()
        self._key: str | None = None
        self._in_value = False
        """The colon of the member was there."""
        self._said: list[str] = []
        """What there is of the key or the value that is being read."""
        self._streams = False
        """The value is the arguments, an object, which is told as it comes."""
        self._has_arguments = False
        """The last member was the arguments, and their last bracket was there."""
        self._given: str | None = None
        """How the arguments begin; None before they come."""

    @property
    def has_begun(self) -> bool:
        return self.name is not None and self._given == "{"

    @property
    def is_whole(self) -> bool:
        return self.name is not None and self._has_arguments

    def push(self, text: str) -> str:
        at = 0
        while at < len(text) and not (self.is_done or self.is_wrong):
            if self.is_whole and not text[at].isspace() and text[at] not in ",}":
                self.is_done = True  # its last bracket was forgotten
            elif (self.is_whole or self._signs.depth == 0) and text[at].isspace():
                at += 1
            elif self._signs.depth == 0 and text[at] != "{":
                self.is_wrong = True
                at += 1
            else:
                at = self._take(text, at)
        return text[at:]

    def _take(self, text: str, at: int) -> int:
        """Takes text up to the next sign, and the sign; where it ends."""
        was_text, depth = self._signs.in_text, self._signs.depth
        end, sign = self._signs.next(text, at)
        said = text[at:end]
        inner = was_text or depth > 1 or sign not in {",", "}", "]"}  # else it ends the member
        if not inner:
            said = said[:-1]
        if depth == 1 and not self._in_value:
            self._in_key(said, sign)
        elif depth >= 1:
            self._add(said, was_text)
        if self._streams and depth == 2 and self._signs.depth == 1 and not was_text:
            self._streams, self._has_arguments = False, True
        if not inner and depth == 1:
            self._end_member()
            if self._signs.depth == 0:
                self._end()
        return end

    def _in_key(self, said: str, sign: str) -> None:
        if sign == '"' and self._signs.in_text:  # it begins
            self._said = ['"']
        elif self._signs.in_text or sign == '"':
            self._said.append(said)
            if sign == '"':
                self._key, self._said = _text("".join(self._said)), []
        elif sign == ":":
            self._in_value, self._said = True, []
        elif sign and sign in "{[":  # a value without a key
            self._in_value, self._said = True, [said]

    def _add(self, said: str, was_text: bool) -> None:
        """More of a value; ``was_text``: of a text within it."""
        if not self._said and not self._streams:
            said = said.lstrip()
            if said and self._key in ARGUMENTS and self._given is None and not self._has_arguments:
                self._streams = said[0] == "{"
                self._given = "{" if self._streams else None
        if self._streams:
            self._new.append(_in_json(said) if was_text else said)
        elif said:
            self._said.append(said)

    def _end_member(self) -> None:
        value = "".join(self._said).strip()
        if self._key in NAMES:
            if (name := _text(value)) in self._names:
                self.name = name
            else:
                self.is_wrong = True
        elif self._key in ARGUMENTS and self._given is None:
            # Some models write JSON in a text, others null or an empty text where there are none.
            said = value if (text := _text(value)) is None else text
            if said not in ("", "null"):
                self._new.append(said)
                self._given = said[0]
        self._key, self._in_value, self._said, self._has_arguments = None, False, [], False

    def _end(self) -> None:
        if self._given is None:
            self._new.append("{}")
        self.is_done = self.name is not None and not self.is_wrong
        self.is_wrong = not self.is_done


class FramedScanner(Scanner):
    """Arguments in JSON after the name and what stands around it. What ends the call is left to the caller."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        super().__init__(names)
        assert form.header
        self._pattern = re.compile(rf"\s*{form.header}\s*")
        self._is_bare = form.is_bare
        self._skips = form.call[0].startswith("{")
        """Whether the first bracket is not that of the arguments."""
        self._header = ""
        self._signs = JsonSigns()

    @property
    def has_begun(self) -> bool:
        return self.name is not None

    def push(self, text: str) -> str:
        at = 0
        if self.name is None:
            at = self._read_header(text)
        while at < len(text) and not (self.is_done or self.is_wrong):
            first, was_text = at, self._signs.in_text
            at, _ = self._signs.next(text, at)
            self._new.append(_in_json(text[first:at]) if was_text else text[first:at])
            self.is_done = self._signs.depth == 0
        return text[at:]

    def _read_header(self, text: str) -> int:
        at = 0
        if self._skips and (rest := text.lstrip()):
            self._skips = False
            if rest[0] == "{":
                at = len(text) - len(rest) + 1
        brace = text.find("{", at)
        end = min(len(text) if brace < 0 else brace, at + MOST_HEADER_CHARS - len(self._header))
        self._header += text[at:end]
        if end == brace and (found := self._pattern.fullmatch(self._header)) and found["name"] in self._names:
            self.name, self._header = found["name"], ""
        else:
            self.is_wrong = end == brace or len(self._header) >= MOST_HEADER_CHARS or not self._may_call()
        return end

    def _may_call(self) -> bool:
        """Whether what came may become a call, where nothing told that one comes."""
        said = self._header.strip()
        return not self._is_bare or any(
            name.startswith(said) if self._header.endswith(said) else name == said for name in self._names
        )


def scan_object(form: ToolFormat, names: Collection[str]) -> Scanner:
    """For calls in JSON, as a whole or behind their name."""
    return FramedScanner(form, names) if form.header else CallScanner(names)


def _in_json(said: str) -> str:
    """A piece of a text in JSON. Models write the ends of lines there as they are, which JSON does not allow."""
    return CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], said)


def _text(value: str) -> str | None:
    """A text written as JSON."""
    try:
        found = json.loads(value, strict=False)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, str) else None
