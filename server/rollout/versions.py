"""What trainers call sets of weights. The server tells them apart by numbers, of which no two are the same."""

from __future__ import annotations

from dataclasses import dataclass

FILES = "default"
"""What the weights of the model's files are called."""
MOST_NAMES = 1000
"""Versions whose names are known: of more, the oldest are forgotten. Nothing that runs is that old, but weights of the
model's files come back."""


@dataclass(slots=True, eq=False)
class Called:
    """What weights are called for a while."""

    name: str
    is_given: bool = True
    """Whether somebody has said so; else it is a number."""

    def give(self, name: str) -> None:
        """A name that comes late counts where there was none."""
        if not self.is_given:
            self.name, self.is_given = name, True


@dataclass(slots=True)
class UnderWay:
    """An update that has begun."""

    number: int
    """What the engine calls its version; versions of this server never have the same."""
    called: Called
    is_whole: bool = False
    """Whether one operation brings all of it: nothing else belongs to it."""


class Versions:
    """By number; 0 are the weights of the model's files."""

    def __init__(self) -> None:
        self._called: dict[int, Called] = {0: Called(FILES)}

    def called(self, number: int) -> Called:
        """What these are called; another object once it is another name."""
        if number not in self._called:
            self._called[number] = Called(str(number), is_given=False)
        return self._called[number]

    def call(self, number: int, called: Called) -> None:
        """They are called so from now on."""
        self._called[number] = called
        while len(self._called) > MOST_NAMES:
            del self._called[min(self._called.keys() - {0})]
