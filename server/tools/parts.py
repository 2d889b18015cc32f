"""What the text of an answer consists of, as a parser tells it while the text arrives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool; its arguments follow."""

    index: int
    """0 for the first of the answer."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of the call that began last, as JSON text."""

    index: int
    text: str


Part = Content | Reasoning | CallBegin | CallArguments


class Parser(Protocol):
    """What the parts add up to does not depend on how the text is cut into pieces."""

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, now that no more text comes."""
        ...


class StepParser(ABC):
    """Digests the text step by step, as far as it has come."""

    def __init__(self, first: Callable[[], bool]) -> None:
        self._text = ""
        """What is not digested."""
        self._step = first
        """Digests some of the text, and says what does so next; False when more has to come first."""
        self._found: list[Part] = []

    def push(self, text: str) -> list[Part]:
        self._text += text
        while self._text and self._step():
            pass
        return self._take()

    def finish(self) -> list[Part]:
        self._end_of_text()
        self._text = ""
        return self._take()

    @abstractmethod
    def _end_of_text(self) -> None:
        """What is left means something now, or nothing: no more text comes."""

    def _take(self) -> list[Part]:
        found, self._found = self._found, []
        return found


def beginning_of(text: str, markers: tuple[str, ...]) -> int:
    """Where the end of a text begins that may turn out to be the beginning of a marker; its length if it has none."""
    for start in range(max(0, len(text) - max(map(len, markers)) + 1), len(text)):
        if any(marker.startswith(text[start:]) for marker in markers):
            return start
    return len(text)
