"""How a text that follows a grammar comes to an end that matches, before no tokens are left for one.

What a text still needs is found by trying: a matcher says which bytes may come next, and those are taken that close
what is open. That is short, and not always the shortest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

Mask = NDArray[np.uint8]
"""A bit per token, the lowest of each byte first: whether it may come next."""
NEAR = 256
"""Ends are looked for where at most so many tokens are left."""
CLOSE = 32
"""Where so many tokens are left beyond those that an end takes, or fewer, each has to leave time for an end."""
RETRY = 8
"""Where nothing was found, it is tried again after so many tokens."""
MOST_BYTES = 2000
"""An end that takes more is not looked for."""
MOST_TRIED = 96
"""Tokens that are tried one by one at a place: the first ones, in vocabularies of merges the most frequent."""
MOST_SEARCHES = 8
"""Ends that are looked for anew meanwhile."""
LONGEST_CHARACTER = 4
LONGEST_TOKEN = 24
"""Bytes of tokens that ends are made of."""
IN_TEXT = ord("~")
"""Where it may come, a text is under way that holds nearly anything, as between quotes."""
FEW = 1000
"""Fewer tokens are tried one by one also there."""
LEAVING = b"\"'`.;)]}>|\n/-!?,: @"
"""What may end such a text."""
CLOSING = b'"}]):,0n1a'
"""What is tried elsewhere, in this order, before all others."""
BRACKETS = b'"}]),:'
"""What of these closes or parts values, and is right however often it comes."""
MOST_TIMES = 6
"""What was chosen so often within a value has not led to its end, as digits of a fraction, and comes after others."""
DIGIT, LETTER, SIGN = -1, -2, -3
"""Kinds of bytes."""
BLANK = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Ending:
    """What brings a text to its end; both are empty where it may end as it is."""

    steps: tuple[int, ...]
    """Tokens of one byte each, and special ones."""
    tokens: tuple[int, ...]
    """The same in as few tokens."""

    @property
    def cost(self) -> int:
        """Tokens, with one that stops."""
        return len(self.tokens) + 1


NOTHING_MISSING = Ending((), ())


def kind_of(byte: int) -> int:
    said = bytes((byte,))
    return byte if byte in BRACKETS else DIGIT if said.isdigit() else LETTER if said.isalpha() else SIGN


class Alphabet:
    """The tokens of a vocabulary by what they stand for."""

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int]) -> None:
        self._tokens = tokens
        self._special = frozenset(special)
        self.end = len(tokens)
        """Stands for the end of a text."""
        self._by_bytes: dict[bytes, int] = {}
        inner, partial, blank = np.zeros((3, -(-(self.end + 1) // 32) * 32), bool)
        for token, data in enumerate(tokens):
            if not data or token in self._special:
                continue
            if len(data) <= LONGEST_TOKEN:
                self._by_bytes.setdefault(data, token)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                partial[token] = True
                continue
            inner[token] = text.isprintable() and '"' not in text and "\\" not in text
            blank[token] = text.isspace()
        self.single = {data[0]: token for data, token in self._by_bytes.items() if len(data) == 1}
        """Tokens of one byte, by that."""
        self.inner: Mask = np.packbits(inner, bitorder="little")
        """Tokens that can neither end a text between quotes nor begin an escape."""
        self.partial: Mask = np.packbits(partial, bitorder="little")
        """Tokens that are, or have, a part of a character."""
        self.blank: Mask = np.packbits(blank, bitorder="little")

    def special_in(self, mask: Mask) -> int | None:
        """One that a mask allows."""
        return next((token for token in sorted(self._special) if mask[token >> 3] >> (token & 7) & 1), None)

    def byte_in(self, mask: Mask, chosen: Counter[int]) -> int | None:
        """A byte that a mask allows: one chosen too often comes later; blanks and parts of characters come last."""
        allowed = [byte for byte, token in self.single.items() if mask[token >> 3] >> (token & 7) & 1]

        def order(byte: int) -> tuple[bool, int, int, int]:
            return byte in BLANK or byte >= 0x80, chosen[kind_of(byte)] // MOST_TIMES, chosen[byte], byte

        return min(allowed, key=order, default=None)

    def bytes_of(self, text: bytes) -> list[int] | None:
        found = [self.single.get(byte) for byte in text]
        return None if None in found else [token for token in found if token is not None]

    def length(self, token: int) -> int:
        """In steps."""
        return 1 if token in self._special else len(self._tokens[token])

    def ends_with(self, token: int, steps: Sequence[int]) -> bool:
        return self._tokens[token].endswith(b"".join(self._tokens[step] for step in steps))

    def cut(self, steps: Sequence[int]) -> tuple[int, ...]:
        """The longest token each time."""
        found: list[int] = []
        run = bytearray()
        for step in (*steps, None):
            if step is not None and step not in self._special:
                run += self._tokens[step]
                continue
            while run:
                sizes = range(min(len(run), LONGEST_TOKEN), 0, -1)
                size = next(size for size in sizes if bytes(run[:size]) in self._by_bytes)
                found.append(self._by_bytes[bytes(run[:size])])
                del run[:size]
            if step is not None:
                found.append(step)
        return tuple(found)


class Endings:
    """Ends of what a matcher follows. All methods leave it where it is."""

    def __init__(self, matcher: LLMatcher, alphabet: Alphabet) -> None:
        self._matcher = matcher
        self._alphabet = alphabet
        self._cut = lru_cache(256)(alphabet.cut)

    def after(self, before: Ending | None, token: int | None, left: int) -> Ending | None:
        """An end from where the matcher is, with so many tokens left; ``before`` is what there was before ``token``.

        It depends on the tokens since the beginning alone. None: not found, or not looked for yet.
        """
        if left > NEAR:
            return None
        if self._matcher.is_accepting():
            return NOTHING_MISSING
        if before is not None and token is not None:
            if before.tokens and before.tokens[0] == token:
                return Ending(before.steps[self._alphabet.length(token) :], before.tokens[1:])
            if (kept := self._kept(before, token)) is not None:
                return kept
        elif token is not None and left % RETRY and left != NEAR:
            return None
        return self._search()

    def fitting(self, mask: Mask, ending: Ending | None, left: int) -> Mask:
        """What of a mask leaves time for an end, with so many tokens left for what it allows; the same if all does."""
        if ending is None or not ending.cost <= left <= ending.cost + CLOSE:
            return mask
        alphabet, spare = self._alphabet, left - ending.cost
        inner = mask & alphabet.inner
        found = np.zeros_like(mask)
        if int(np.bitwise_count(inner).sum()) >= FEW:  # they leave the text as open as it is
            if not ending.tokens:
                return mask
            partial = mask & alphabet.partial
            tried = mask & ~inner & ~partial
            found |= inner if spare >= 1 else 0
            found |= partial if spare >= LONGEST_CHARACTER else 0
        else:
            blank = mask & alphabet.blank
            tried = mask & ~blank
            found |= blank if spare >= 1 else 0
        known = [ending]
        sure = (*ending.tokens[:1], alphabet.end)
        for token in sure:
            found[token >> 3] |= mask[token >> 3] & 1 << (token & 7)
        for token in np.unpackbits(tried, bitorder="little").nonzero()[0][:MOST_TRIED].tolist():
            if token not in sure and self._fits(known, token, left - 1):
                found[token >> 3] |= 1 << (token & 7)
        return mask if np.array_equal(found, mask) or not found.any() else found

    def _fits(self, known: list[Ending], token: int, left: int) -> bool:
        """``known`` gets what is found besides."""
        if not self._matcher.consume_token(token):
            return False
        found = next((kept for before in known if (kept := self._kept(before, token)) is not None), None)
        if found is None and len(known) <= MOST_SEARCHES and (found := self._search()) is not None:
            known.append(found)
        self._matcher.rollback(1)
        return found is not None and (found.cost <= left or not found.tokens)

    def _kept(self, before: Ending, token: int) -> Ending | None:
        """What is left of an end after a token: nothing, all, or what follows the bytes that it ended with."""
        if self._matcher.is_accepting():
            return NOTHING_MISSING
        for taken in range(min(4, len(before.steps) + 1)):
            if taken and not self._alphabet.ends_with(token, before.steps[:taken]):
                continue
            steps = before.steps[taken:]
            if self._matcher.validate_tokens([*steps, self._alphabet.end]) == len(steps) + 1:
                return before if not taken else Ending(steps, self._cut(steps))
        return None

    def _search(self) -> Ending | None:
        steps: list[int] = []
        chosen: Counter[int] = Counter()
        while not self._matcher.is_accepting():
            more = self._next(chosen) if len(steps) < MOST_BYTES else None
            if not more or not self._matcher.consume_tokens(more):
                break
            steps += more
        found = Ending(tuple(steps), self._cut(tuple(steps))) if self._matcher.is_accepting() else None
        self._matcher.rollback(len(steps))
        return found

    def _next(self, chosen: Counter[int]) -> list[int] | None:
        """Steps towards an end; ``chosen``: how often each byte, and each kind, since a value ended."""
        if forced := self._matcher.compute_ff_bytes():
            return self._alphabet.bytes_of(forced)
        if (byte := self._closing(chosen)) is None:
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if (special := self._alphabet.special_in(mask)) is not None:
                return [special]
            if self._may(ord("a")) and chosen[LETTER] < MOST_TIMES:
                byte = ord("a")
            else:
                byte = self._alphabet.byte_in(mask, chosen)
        if byte is None:
            return None
        if byte in b'",':
            chosen.clear()
        else:
            chosen.update({byte, kind_of(byte)})
        return [self._alphabet.single[byte]]

    def _closing(self, chosen: Counter[int]) -> int | None:
        if self._may(IN_TEXT):
            single = self._alphabet.single
            return next((byte for byte in LEAVING if self._may(byte) and self._leaves(single[byte])), None)
        return next(
            (byte for byte in CLOSING if (byte in BRACKETS or chosen[kind_of(byte)] < MOST_TIMES) and self._may(byte)),
            None,
        )

    def _may(self, byte: int) -> bool:
        token = self._alphabet.single.get(byte)
        return token is not None and self._matcher.validate_tokens([token]) == 1

    def _leaves(self, token: int) -> bool:
        """Whether it ends a text that holds nearly anything."""
        self._matcher.consume_token(token)
        found = self._matcher.is_accepting() or not self._may(IN_TEXT)
        self._matcher.rollback(1)
        return found
