"""The bytes of all tokens of a vocabulary in two pieces of memory: objects of their own take ten times as much."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import overload


class TokenBytes(Sequence[bytes]):
    """By token id: what it stands for. Takes as much as all of it and four bytes for each token."""

    __slots__ = ("_bounds", "_data", "_hidden")

    def __init__(self, tokens: Iterable[bytes]) -> None:
        tokens = list(tokens)
        self._data = b"".join(tokens)
        self._bounds = array("I", chain((0,), accumulate(map(len, tokens))))
        """Where each begins, and the last one ends."""
        self._hidden: frozenset[int] = frozenset()

    def without(self, tokens: frozenset[int]) -> TokenBytes:
        """The same, but that these tokens stand for nothing; shares the memory."""
        found = TokenBytes.__new__(TokenBytes)
        found._data, found._bounds, found._hidden = self._data, self._bounds, self._hidden | tokens
        return found

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[bytes]:
        for token, (begin, end) in enumerate(pairwise(self._bounds)):
            yield b"" if token in self._hidden else self._data[begin:end]

    @overload
    def __getitem__(self, token: int) -> bytes: ...
    @overload
    def __getitem__(self, token: slice) -> list[bytes]: ...
    def __getitem__(self, token: int | slice) -> bytes | list[bytes]:
        if isinstance(token, slice):
            return [self[each] for each in range(*token.indices(len(self)))]
        if token < 0:
            raise IndexError(f"there is no token {token}")
        end = self._bounds[token + 1]  # raises IndexError behind the last
        return b"" if token in self._hidden else self._data[self._bounds[token] : end]
