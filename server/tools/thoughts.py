"""Calls of tools that a model makes before it has ended its reasoning, as some do now and then."""

from __future__ import annotations

import re
from collections.abc import Callable

from slipstream.server.tools.calls import CallParser
from slipstream.server.tools.parts import CallBegin, Content, Part, Reasoning, beginning_of

PIECE_CHARS = 64
"""What is tried at a time: what follows the place where it turns out to be no call was tried in vain."""


class CallsInThought:
    """Goes through reasoning. A call in it is only a thought of one, unless the answer ends with it.

    That is: calls begin at the first place from which there is nothing else up to the end of the answer, the tag that
    ends the reasoning aside. What may be such calls is held back.
    """

    def __init__(self, new_parser: Callable[[], CallParser]) -> None:
        self._new_parser = new_parser
        self._begins = new_parser().sought
        one = "|".join(map(re.escape, self._begins))
        self._several = re.compile(rf"(?:(?:{one})\s*)+")
        """What begins calls, perhaps repeated: if there is none behind the first, there is none behind the others."""
        self._held: list[str] = []
        """What is not told, in pieces."""
        self._tried: CallParser | None = None
        """Has taken what is held, and found nothing but calls."""
        self._found: list[Part] = []
        """By that."""
        self.num_calls = 0
        """When the answer has ended."""

    def push(self, text: str) -> list[Part]:
        """What of more reasoning, and of what was held back, is that for sure."""
        self._held.append(text)
        if self._tried is not None and self._goes_on(self._tried, text):
            return []
        held, safe = "".join(self._held), 0
        if self._tried is not None:
            safe = self._end_of_begin(held, 0)
        self._tried = None
        while found := self._several.search(held, safe):
            tried, self._found = self._new_parser(), []
            if self._goes_on(tried, held[found.start() :]):
                self._tried, safe = tried, len(held[: found.start()].rstrip())
                break
            safe = self._end_of_begin(held, safe)
        if self._tried is None:
            safe = max(safe, len(held[: beginning_of(held, self._begins)].rstrip()))
        self._held = [held[safe:]]
        return [Reasoning(held[:safe])] if safe else []

    def _end_of_begin(self, held: str, at: int) -> int:
        found = self._several.search(held, at)
        assert found is not None
        return found.end()

    def _goes_on(self, tried: CallParser, text: str) -> bool:
        """Whether that may be more of the calls."""
        for begin in range(0, len(text), PIECE_CHARS):
            new = tried.push(text[begin : begin + PIECE_CHARS])
            if any(isinstance(part, Content) for part in new):
                return False
            self._found += new
        return True

    def give_up(self) -> list[Part]:
        """The reasoning has ended, and something else follows."""
        said, self._held, self._tried = "".join(self._held), [], None
        return [Reasoning(said)] if said else []

    def finish(self) -> list[Part]:
        found = self._found + self._tried.finish() if self._tried is not None else []
        if not any(isinstance(part, CallBegin) for part in found) or any(isinstance(part, Content) for part in found):
            return self.give_up()
        assert self._tried is not None
        self.num_calls = self._tried.num_calls
        return found
