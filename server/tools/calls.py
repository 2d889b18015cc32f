"""Takes calls of tools out of the text of an answer while it arrives."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from slipstream.server.tools.formats import ToolFormat
from slipstream.server.tools.parts import CallArguments, CallBegin, Content, StepParser, beginning_of
from slipstream.server.tools.scanner import CallScanner
from slipstream.server.tools.tagged import Kinds, TaggedScanner

BETWEEN = " \t\r\n,;[]"
"""What may stand around calls and means nothing."""


class CallParser(StepParser):
    """What looks like a call but is none, or is one of a tool that nobody has named, is content as it stands.

    A call whose arguments are broken is told as far as it goes: it may have been told before that is known. What an
    answer has begun after its calls, and may have been one more, is left out if it ends before that is known.
    """

    def __init__(
        self,
        form: ToolFormat,
        names: Collection[str],
        most: int | None = None,
        kinds: Mapping[str, Mapping[str, Kinds]] | None = None,
    ) -> None:
        """``names`` of the tools; calls beyond the first ``most`` are left out. ``kinds`` of their arguments, where
        these are no JSON."""
        super().__init__(self._start if form.is_bare else self._find)
        self._form, self._names, self._most, self._kinds = form, names, most, kinds or {}
        self._markers = tuple(each for each in (form.begin, form.after.strip(BETWEEN)) if each)
        self._raw = ""
        """What was digested since the last content or call, in case it turns out to be content."""
        self._scanner: CallScanner | TaggedScanner = CallScanner(names)
        self._told = -1
        """Characters of the arguments of this call that were told; -1: nothing of it."""
        self._trims = False
        """White space is to be left out, after a call."""
        self.num_calls = 0

    def _end_of_text(self) -> None:
        if self._told < 0 and not (self.num_calls and self._step != self._find):  # else a marker or a call was cut off
            self._tell_content(self._raw + self._text)
        elif self._told >= 0 and self._scanner.is_whole:
            self.num_calls += 1
        self._raw = ""

    @property
    def _follows_a_call(self) -> bool:
        """Whether nothing but what means nothing has come since the last call."""
        return self._step == self._between and self._trims and not self._raw

    # Each of these digests some of the text; False when more has to come first.

    def _start(self) -> bool:
        """At the beginning of an answer that may be a call as a whole."""
        rest = self._text.lstrip()
        if rest:
            self._step = self._between if rest[0] in "{[" else self._find
        return bool(rest)

    def _find(self) -> bool:
        """Looks for what begins calls."""
        if not (begin := self._form.begin):
            self._tell_content(self._text)
            self._text = ""
            return False
        before, found, after = self._text.partition(begin)
        if not found:
            keep = beginning_of(self._text, (begin,))
            before, after = self._text[:keep], self._text[keep:]
        self._tell_content(before)
        self._raw, self._text = found, after
        if found:
            self._step = self._between
        return bool(found)

    def _between(self) -> bool:
        """Around calls."""
        rest = self._text
        for marker in self._markers:
            if rest.startswith(marker):
                ends = marker != self._form.begin
                self._raw = "" if ends and self._follows_a_call else self._raw + marker
                self._text = rest[len(marker) :]
                if ends:
                    self._leave()
                return True
        if any(marker.startswith(rest) for marker in self._markers):
            return False
        if rest[0] in BETWEEN:
            self._raw += "" if self._follows_a_call else rest[0]
            self._text = rest[1:]
            return True
        if self._form.parameter is not None and self._raw:
            self._scanner = TaggedScanner(self._form, self._names, self._kinds)
            self._told, self._step = -1, self._call
        elif self._form.names_first and rest[0] != "{" and self._raw:
            self._step = self._name
        elif rest[0] == "{" and not self._form.names_first and self._form.parameter is None:
            self._scanner, self._told, self._step = CallScanner(self._names), -1, self._call
        else:
            self._leave()
        return True

    def _name(self) -> bool:
        """A name that stands before its arguments, perhaps with an id between them."""
        before, brace, _ = self._text.partition("{")
        if not brace:
            return False
        self._raw, self._text = self._raw + before, self._text[len(before) :]
        scanner = CallScanner(self._names)
        scanner.begin(re.split(r"\[[A-Z_]+\]", before)[0].strip())
        self._scanner, self._told, self._step = scanner, -1, self._call
        if self._scanner.is_wrong:
            self._leave()
        return True

    def _call(self) -> bool:
        """In an object that calls a tool, or in the arguments that stand for it."""
        scanner = self._scanner
        count = scanner.push(self._text)
        self._raw, self._text = self._raw + self._text[:count], self._text[count:]
        if scanner.is_done or scanner.has_begun:
            self._tell_call()
        if scanner.is_wrong and self._told < 0:
            self._leave()
        elif scanner.is_done or scanner.is_wrong:
            self.num_calls += 1
            self._raw, self._told, self._trims, self._step = "", -1, True, self._between
        return scanner.is_done or scanner.is_wrong

    def _leave(self) -> None:
        """What was taken for more calls is content; so is what follows, up to the next of them."""
        raw, self._raw, self._step = self._raw, "", self._find
        self._tell_content(raw)

    def _tell_content(self, text: str) -> None:
        if self._trims:
            text = text.lstrip()
        if text:
            self._trims = False
            self._found.append(Content(text))

    def _tell_call(self) -> None:
        if self._most is not None and self.num_calls >= self._most:
            self._told = 0
            return
        scanner = self._scanner
        assert scanner.name is not None
        if self._told < 0:
            self._found.append(CallBegin(self.num_calls, scanner.name))
            self._told = 0
        if new := scanner.arguments[self._told :]:
            self._found.append(CallArguments(self.num_calls, new))
            self._told = len(scanner.arguments)
