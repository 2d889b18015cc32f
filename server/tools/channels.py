"""Answers in several messages, each on a channel (gpt-oss): what is thought, calls of tools, what is said."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from slipstream.server.tools.parts import CallArguments, CallBegin, Content, Reasoning, StepParser, beginning_of

BEGIN = "<|channel|>"
MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
"""What ends a message; the last of them begins the next one."""
RECIPIENT = re.compile(r"\bto=functions\.([\w.:-]+)", re.ASCII)
MOST_HEADER_CHARS = 512
ANALYSIS = re.compile(r"<\|channel\|>analysis\b")


class ChannelParser(StepParser):
    """What is thought comes on the channel analysis; a message to a function calls it; everything else is said. An
    answer that does not begin with a message is said as a whole, as one is that follows a grammar of its own."""

    def __init__(self, names: Collection[str], most: int | None = None) -> None:
        """``names`` of the tools; what is for others is said. Calls beyond the first ``most`` are left out."""
        super().__init__(self._start)
        self._names, self._most = names, most
        self._kind = "said"
        self._arguments: list[str] = []
        self._space: list[str] = []
        """Before the first message."""
        self._num_begun = 0
        self.num_calls = 0

    def _end_of_text(self) -> None:
        if self._step == self._start:
            self._tell("".join([*self._space, self._text]))
        elif self._step == self._body:
            self._tell(self._text)
            self._end(is_cut=True)

    # Each of these digests some of the text; False when more has to come first.

    def _start(self) -> bool:
        rest = self._text.lstrip()
        self._space.append(self._text[: len(self._text) - len(rest)])
        self._text = rest
        firsts = (BEGIN, "to=", "<|start|>")
        if any(rest.startswith(first) for first in firsts):
            self._step = self._header
        elif any(first.startswith(rest) for first in firsts):
            return False
        else:
            self._text, self._step = "".join([*self._space, rest]), self._rest
        self._space = []
        return True

    def _rest(self) -> bool:
        self._tell(self._text)
        self._text = ""
        return False

    def _header(self) -> bool:
        header, found, after = self._text.partition(MESSAGE)
        if not found:
            # Of one that never ends, as much as may say for whom the message is.
            self._text = header[:MOST_HEADER_CHARS] + header[max(MOST_HEADER_CHARS, len(header) - len(MESSAGE)) :]
            return False
        self._text, self._step, self._arguments = after, self._body, []
        recipient = RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self._names:
            self._kind = "call" if self._most is None or self._num_begun < self._most else "none"
            if self._kind == "call":
                self._found.append(CallBegin(self._num_begun, recipient[1]))
                self._num_begun += 1
        else:
            self._kind = "thought" if ANALYSIS.search(header) else "said"
        return True

    def _body(self) -> bool:
        ends = [(at, end) for end in ENDS if (at := self._text.find(end)) >= 0]
        if not ends:
            safe = beginning_of(self._text, ENDS)
            told, self._text = self._text[:safe], self._text[safe:]
            self._tell(told)
            return False
        at, end = min(ends)
        self._tell(self._text[:at])
        self._text = self._text[at + len(end) :]
        self._end(is_cut=False)
        self._step = self._header
        return True

    def _tell(self, text: str) -> None:
        if not text:
            return
        if self._kind == "call":
            self._arguments.append(text)
            self._found.append(CallArguments(self._num_begun - 1, text))
        elif self._kind != "none":
            self._found.append(Reasoning(text) if self._kind == "thought" else Content(text))

    def _end(self, is_cut: bool) -> None:
        """A message ends; the token that ends a call ends the answer, too, and is not in its text."""
        if self._kind != "call":
            return
        if not self._arguments and not is_cut:
            self._tell("{}")
        if not is_cut or _is_whole("".join(self._arguments)):
            self.num_calls += 1
        self._kind = "none"


def _is_whole(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
