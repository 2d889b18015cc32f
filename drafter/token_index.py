"""Finds where the end of a text occurred before, and what followed there."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

KEYS = (2, 4, 8, 16, 32)
"""Lengths of matches that are told apart, in tokens; a longer match makes a draft token no better."""
LONGEST_MATCH = KEYS[-1]
CROWDED = 8
"""Latest places that are looked at. Where more share the same last tokens, longer keys tell them apart."""
TOKEN_BYTES = 4


class TokenIndex:
    """A text that grows, with the places of its runs of tokens.

    Every place is found by its last two tokens, and by four, eight and so on where the shorter run has occurred more
    than CROWDED times before: a trie by doubling, as deep as the text repeats itself. Of a run that often are only the
    latest places kept. Takes about 125 bytes per token.
    """

    def __init__(self) -> None:
        self.text = array("i")
        assert self.text.itemsize == TOKEN_BYTES
        self._places: dict[int, list[int]] = {}
        """By the hash of a run: where the token after it stands, oldest first."""

    def __len__(self) -> int:
        return len(self.text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the text."""
        begin = len(self.text)
        self.text.extend(tokens)
        first = max(begin - LONGEST_MATCH, 0)
        known = self.text[first:].tobytes()
        for end in range(begin + 1, len(self.text) + 1):
            stop = (end - first) * TOKEN_BYTES
            for key in KEYS:
                if end < key:
                    break
                places = self._places.setdefault(hash(known[stop - key * TOKEN_BYTES : stop]), [])
                places.append(end)
                if len(places) <= CROWDED:
                    break
                if len(places) > 2 * CROWDED:
                    del places[:CROWDED]

    def matches(self, context: Sequence[int]) -> tuple[int, list[int]]:
        """The longest of KEYS for which the end of ``context`` occurs, and the latest places after it, oldest first.

        (0, []) if there are none. The end of the text itself, after which nothing stands, is left out.
        """
        known = array("i", context[-LONGEST_MATCH:]).tobytes()
        best: tuple[int, list[int]] = (0, [])
        for key in KEYS:
            run = known[-key * TOKEN_BYTES :]
            if len(run) < key * TOKEN_BYTES:
                break
            nearer, crowd = best[1], self._places.get(hash(run), [])
            # Those from before the shorter run was crowded are not among the places of the longer one.
            candidates = sorted({*nearer, *crowd}) if nearer and crowd else nearer or crowd
            found = [place for place in candidates if place < len(self.text) and self._ends_with(run, key, place)]
            if not found:
                break
            best = key, found[-CROWDED:]
        return best

    def _ends_with(self, run: bytes, key: int, place: int) -> bool:
        return place >= key and self.text[place - key : place].tobytes() == run
