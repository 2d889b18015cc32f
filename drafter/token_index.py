"""Finds where the end of a text occurred before, and what followed there."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice

KEY_TOKENS = 2
"""Shortest match."""
LONGEST_MATCH = 16
"""Beyond this a longer match makes a draft token no better."""
CANDIDATES = 8
"""Latest occurrences that are looked at."""


class TokenIndex:
    """A text that grows, with the places of every pair of neighbouring tokens.

    Takes about 100 bytes per token.
    """

    def __init__(self) -> None:
        self.text = array("i")
        self._places: dict[int, list[int]] = {}
        """By pair of tokens: where the token after it stands, oldest first."""

    def __len__(self) -> int:
        return len(self.text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the text."""
        begin = len(self.text)
        self.text.extend(tokens)
        text, places = self.text, self._places
        for end in range(max(begin, KEY_TOKENS), len(text) + 1):
            if end > begin:
                places.setdefault(_key(text[end - 2], text[end - 1]), []).append(end)

    def matches(self, context: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(length of the match, place after it) for the latest places that follow the end of ``context``, latest first.

        The end of the text itself, after which nothing stands, is left out.
        """
        if len(context) < KEY_TOKENS:
            return
        text = self.text
        places = self._places.get(_key(context[-2], context[-1]), ())
        for place in islice((place for place in reversed(places) if place < len(text)), CANDIDATES):
            length = KEY_TOKENS
            most = min(LONGEST_MATCH, len(context), place)
            while length < most and text[place - 1 - length] == context[-1 - length]:
                length += 1
            yield length, place


def _key(first: int, second: int) -> int:
    return first << 32 | second
