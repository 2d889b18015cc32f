"""Takes calls of tools out of the text of an answer while it arrives."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from slipstream.server.tools.formats import ToolFormat
from slipstream.server.tools.literal import LiteralScanner
from slipstream.server.tools.parts import CallArguments, CallBegin, Content, StepParser, beginning_of
from slipstream.server.tools.scanner import Scanner, scan_object
from slipstream.server.tools.tagged import Kinds, TaggedScanner

BETWEEN = " \t\r\n,;[]"
"""What may stand around calls and means nothing."""
MEANS_NOTHING = re.compile(r"[ \t\r\n,;\[\]]+")
SPACE = re.compile(r"\s*")


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
        by_grammar: bool = False,
    ) -> None:
        """``names`` of the tools; calls beyond the first ``most`` are left out. ``kinds`` of their arguments, where
        these are no JSON. ``by_grammar``: what is forgotten before a call makes it none, see Speech."""
        super().__init__(self._start if form.is_bare else self._find)
        self._form, self._names, self._most, self._kinds = form, names, most, kinds or {}
        self._ends = tuple(each for each in (form.after.strip(BETWEEN),) if each)
        self._markers = (*form.begins, *self._ends, *form.loose)
        self.sought = (*form.begins, form.alone) if form.alone and not by_grammar else form.begins
        """What begins calls in the midst of text."""
        self._raw: list[str] = []
        """What was digested since the last content or call, in case it turns out to be content."""
        self._scanner: Scanner = self._new_scanner()
        self._is_told = False
        """The call that is being read has begun, and was told unless it is one too many."""
        self._trims = False
        """White space is to be left out, after a call."""
        self.num_calls = 0

    def _end_of_text(self) -> None:
        if not self._is_told and not (self.num_calls and self._step != self._find):  # else a marker or a call was cut
            self._tell_content("".join(self._raw) + self._text)
        elif self._is_told and self._scanner.is_whole:
            self.num_calls += 1
        self._raw = []

    def _new_scanner(self) -> Scanner:
        if self._form.parameter is not None:
            return TaggedScanner(self._form, self._names, self._kinds)
        if self._form.literal is not None:
            return LiteralScanner(self._form, self._names)
        return scan_object(self._form, self._names)

    @property
    def _follows_a_call(self) -> bool:
        """Whether nothing but what means nothing has come since the last call."""
        return self._step == self._between and self._trims and not self._raw

    # Each of these digests some of the text; False when more has to come first.

    def _start(self) -> bool:
        """At the beginning of an answer that may be a call as a whole."""
        found = SPACE.match(self._text)
        assert found is not None
        self._raw.append(found[0])
        self._text = self._text[found.end() :]
        if self._text and self._form.is_object and not self._text.startswith(("{", "[", *self._form.begins)):
            if any(begin.startswith(self._text) for begin in self._form.begins):
                return False
            self._leave()
        elif self._text:
            self._step = self._between
        return bool(self._text)

    def _find(self) -> bool:
        """Looks for what begins calls."""
        sought = self.sought
        at, begin = min(((at, each) for each in sought if (at := self._text.find(each)) >= 0), default=(-1, ""))
        if at < 0:
            at = beginning_of(self._text, sought) if sought else len(self._text)
        self._tell_content(self._text[:at])
        if begin in self._form.begins:
            self._text = self._text[at + len(begin) :]
            self._raw.append(begin)
            self._step = self._between
        else:
            self._text = self._text[at:]
            if begin:
                self._begin_call()
        return bool(begin)

    def _between(self) -> bool:
        """Around calls."""
        rest = self._text
        for marker in self._markers:
            if rest.startswith(marker):
                follows = self._follows_a_call and marker not in self._form.begins
                if not follows:
                    self._raw.append(marker)
                self._text = rest[len(marker) :]
                if marker in self._ends:
                    self._leave()
                return True
        if any(marker.startswith(rest) for marker in self._markers):
            return False
        if found := MEANS_NOTHING.match(rest):
            end = self._end_before_marker(rest, found.end())
            if not self._follows_a_call:
                self._raw.append(rest[:end])
            self._text = rest[end:]
            return True
        if self._may_begin(rest[0]):
            self._begin_call()
        else:
            self._leave()
        return True

    def _end_before_marker(self, rest: str, end: int) -> int:
        """Where a marker begins, or may begin, within the first ``end`` characters, which mean nothing; else that."""
        begins = (at for at in range(1, end) if any(each[0] == rest[at] for each in self._markers))
        for at in begins:
            if any(rest.startswith(each, at) or each.startswith(rest[at : at + len(each)]) for each in self._markers):
                return at
        return end

    def _begin_call(self) -> None:
        self._scanner, self._is_told, self._step = self._new_scanner(), False, self._call

    def _may_begin(self, first: str) -> bool:
        """Whether a call may begin with this; some models write several behind one beginning."""
        if self._form.is_object:
            return first == "{"
        return bool(self._raw) or not self._form.begins_each or not self._follows_a_call

    def _call(self) -> bool:
        """In an object that calls a tool, or in the arguments that stand for it."""
        scanner = self._scanner
        text, self._text = self._text, scanner.push(self._text)
        if not self._is_told:
            self._raw.append(text)
            if self._text:
                self._raw = ["".join(self._raw)[: -len(self._text)]]
        if scanner.is_done or scanner.has_begun:
            self._tell_call()
        if scanner.is_wrong and not self._is_told:
            self._leave()
        elif scanner.is_done or scanner.is_wrong:
            self.num_calls += 1
            self._is_told, self._trims, self._step = False, True, self._between
        return scanner.is_done or scanner.is_wrong

    def _leave(self) -> None:
        """What was taken for more calls is content; so is what follows, up to the next of them."""
        raw, self._raw, self._step = "".join(self._raw), [], self._find
        self._tell_content(raw)

    def _tell_content(self, text: str) -> None:
        if self._trims:
            text = text.lstrip()
        if text:
            self._trims = False
            self._found.append(Content(text))

    def _tell_call(self) -> None:
        new = self._scanner.take()
        is_new, self._is_told, self._raw = not self._is_told, True, []
        if self._most is not None and self.num_calls >= self._most:
            return
        assert self._scanner.name is not None
        if is_new:
            self._found.append(CallBegin(self.num_calls, self._scanner.name))
        if new:
            self._found.append(CallArguments(self.num_calls, new))
